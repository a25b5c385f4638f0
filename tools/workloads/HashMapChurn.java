import java.util.HashMap;
import java.util.Random;

/** Puts and removes values of 200 to 1700 bytes in a map of 120,000 keys, with a pause of 40 ms every 50,000 operations. */
public class HashMapChurn {
    public static void main(String[] arguments) throws InterruptedException {
        Random random = new Random(1);
        HashMap<Integer, byte[]> map = new HashMap<>();
        int keys = 120_000;
        for (long operation = 1; ; operation++) {
            map.put(random.nextInt(keys), new byte[200 + random.nextInt(1500)]);
            if (random.nextInt(4) == 0) map.remove(random.nextInt(keys));
            if (operation % 50_000 == 0) Thread.sleep(40);
        }
    }
}
