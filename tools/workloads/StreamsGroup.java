import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.stream.Collectors;

/** Makes 150,000 records, groups, sorts and keeps some of them, pauses for 150 ms, and again. */
public class StreamsGroup {
    record Row(int key, String word, double value) {}

    public static void main(String[] arguments) throws InterruptedException {
        Random random = new Random(2);
        List<Row> kept = new ArrayList<>();
        while (true) {
            List<Row> rows = new ArrayList<>();
            for (int i = 0; i < 150_000; i++) {
                rows.add(new Row(random.nextInt(5000), "w" + random.nextInt(100_000), random.nextDouble()));
            }
            Map<Integer, Double> means = rows.stream().collect(Collectors.groupingBy(Row::key, Collectors.averagingDouble(Row::value)));
            List<String> words = rows.stream().map(Row::word).distinct().sorted().toList();
            kept.addAll(rows.subList(0, 20_000));
            if (kept.size() > 400_000) kept.subList(0, 100_000).clear();
            if (means.size() + words.size() == 0) System.out.println("nothing");
            Thread.sleep(150);
        }
    }
}
