//! The intervals at which pages are written, by place in the id space: what a forecast has to work with.

use super::format::Trace;
use crate::page::CHUNK_PAGES;

/// How often pages of each part of the id space were written again after each interval. Round 0 is not counted.
pub struct Intervals {
    /// Pages of the id space in a column.
    pub pages_a_column: u64,
    /// Rows begin at intervals of 1, 2, 3, 4, 6, 8, 12, 16, … rounds.
    rows: usize,
    counts: Vec<u64>,
}

impl Intervals {
    /// The intervals of a whole trace, in at most `max_columns` columns of whole chunks.
    pub fn new(trace: &Trace, max_columns: usize) -> Self {
        let nr_chunks = trace.va_chunks.len();
        let pages_a_column = (nr_chunks.div_ceil(max_columns) * CHUNK_PAGES) as u64;
        let columns = trace.nr_pages().div_ceil(pages_a_column) as usize;
        let rows = row_of(trace.rounds().len() as u32) + 1;
        let rows_of: Vec<usize> = (0..=trace.rounds().len() as u32).map(row_of).collect();
        let mut counts = vec![0; columns * rows];
        let mut last = vec![0u32; trace.nr_pages() as usize];
        for round in 1..trace.rounds().len() {
            for run in trace.runs(round) {
                for page in run.first..run.first + run.count {
                    let before = std::mem::replace(&mut last[page as usize], round as u32);
                    if before > 0 {
                        let column = (u64::from(page) / pages_a_column) as usize;
                        counts[column * rows + rows_of[round - before as usize]] += 1;
                    }
                }
            }
        }
        Intervals { pages_a_column, rows, counts }
    }

    /// Columns and rows.
    pub fn size(&self) -> (usize, usize) {
        (self.counts.len() / self.rows, self.rows)
    }

    /// Writes in a column after an interval of that row.
    pub fn count(&self, column: usize, row: usize) -> u64 {
        self.counts[column * self.rows + row]
    }

    /// The shortest interval of a row, in rounds.
    pub fn from_rounds(row: usize) -> f64 {
        match row {
            0 => 1.0,
            odd if odd % 2 == 1 => 2f64.powi(odd.div_ceil(2) as i32),
            even => 1.5 * 2f64.powi(even as i32 / 2),
        }
    }
}

fn row_of(interval: u32) -> usize {
    let doublings = interval.max(1).ilog2();
    let beyond_half = doublings > 0 && interval >> (doublings - 1) & 1 == 1;
    (2 * doublings as usize).saturating_sub(1) + usize::from(beyond_half)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::replay::tests::trace_of;

    #[test]
    fn an_interval_is_counted_where_its_page_is() {
        let trace = trace_of(&[vec![1, 2, 3], vec![2], vec![2, 3], vec![], vec![3], vec![], vec![2]]);
        let intervals = Intervals::new(&trace, 10);
        assert_eq!(intervals.size(), (1, 5), "up to 7 rounds");
        let counts: Vec<u64> = (0..5).map(|row| intervals.count(0, row)).collect();
        assert_eq!(counts, [1, 1, 0, 1, 0], "of 1, 2 and 4 rounds; what round 0 says is left out");
    }

    #[test]
    fn rows_join_without_gaps() {
        let starts: Vec<f64> = (0..8).map(Intervals::from_rounds).collect();
        assert_eq!(starts, [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0]);
        for interval in 1..5000 {
            let row = row_of(interval);
            let range = Intervals::from_rounds(row)..Intervals::from_rounds(row + 1);
            assert!(range.contains(&f64::from(interval)), "{interval} in row {row}");
        }
    }
}
