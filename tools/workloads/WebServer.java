import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.util.Random;
import java.util.UUID;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.ThreadLocalRandom;

/** Serves JSON out of a cache of 80,000 skewed keys on 127.0.0.1:18081; one request in twenty drops its entry. */
public class WebServer {
    static String make(int key) {
        StringBuilder text = new StringBuilder();
        for (int j = 0; j < 60; j++) {
            text.append("{\"id\":").append(key * j).append(",\"n\":\"");
            text.append(UUID.nameUUIDFromBytes(new byte[] {(byte) j})).append("\"}");
        }
        return text.toString();
    }

    public static void main(String[] arguments) throws Exception {
        ConcurrentHashMap<Integer, String> cache = new ConcurrentHashMap<>();
        HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", 18081), 100);
        server.setExecutor(Executors.newFixedThreadPool(4));
        server.createContext("/", exchange -> {
            Random random = ThreadLocalRandom.current();
            int key = (int) (Math.pow(random.nextDouble(), 2) * 80_000);
            byte[] body = ("[" + cache.computeIfAbsent(key, WebServer::make).toUpperCase() + "]").getBytes();
            if (random.nextInt(20) == 0) cache.remove(key);
            exchange.sendResponseHeaders(200, body.length);
            exchange.getResponseBody().write(body);
            exchange.close();
        });
        server.start();
    }
}
