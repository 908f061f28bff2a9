//! The rows of a sweep as Markdown: scores, and how each method stands to the baseline.

use crate::plan::Bits;
use crate::sweep::paired::{Interval, paired};
use crate::sweep::{SweepRow, TaskScore};
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// Means and spreads, then paired comparisons where there is something to compare.
pub fn tables(rows: &[SweepRow], baseline: Option<&str>) -> String {
    let paired = paired_table(rows, baseline);
    match paired.is_empty() {
        true => score_table(rows),
        false => format!("{}\n{paired}", score_table(rows)),
    }
}

/// Where a line stands: bits, which fall, columns that share a scale, and the method's turn.
type Place = (Option<Reverse<Bits>>, usize, usize);

/// Mean and, over seeds, lowest to highest of each task: accuracy of questions, perplexity of
/// texts.
fn score_table(rows: &[SweepRow]) -> String {
    let mut groups: BTreeMap<Place, Vec<&SweepRow>> = BTreeMap::new();
    let mut methods: Vec<&str> = Vec::new();
    for row in rows {
        let place = methods
            .iter()
            .position(|m| *m == row.method)
            .unwrap_or_else(|| {
                methods.push(&row.method);
                methods.len() - 1
            });
        // Falling bits: the original, which has none, comes first.
        let key = (row.bits.map(Reverse), row.group_size.unwrap_or(0), place);
        groups.entry(key).or_default().push(row);
    }
    let tasks: Vec<&String> = rows
        .first()
        .map(|r| r.tasks.keys().collect())
        .unwrap_or_default();
    let is_text = |task: &String| {
        rows.iter()
            .any(|r| r.tasks.get(task).is_some_and(|s| s.perplexity.is_some()))
    };
    let with_questions = !tasks.iter().all(|task| is_text(task));
    let mut text = table_head(&tasks, is_text, with_questions);
    for rows in groups.values() {
        let first = rows[0];
        text += &format!(
            "| {} | {} | {} | {} |",
            first.method,
            first.bits.map_or(String::new(), |n| n.to_string()),
            group_name(first.bits, first.group_size),
            rows.len()
        );
        for task in &tasks {
            let digits = if is_text(task) { 3 } else { 1 };
            text += &format!(" {} |", spread(rows, digits, |r| main_score(r, task)));
        }
        if with_questions {
            let mean = |r: &SweepRow| r.mean_accuracy().unwrap_or(f64::NAN);
            text += &format!(" {} |", spread(rows, 1, mean));
        }
        text += &format!(" {} |\n", spread(rows, 4, SweepRow::mean_kl));
    }
    text
}

fn group_name(bits: Option<Bits>, group_size: Option<usize>) -> String {
    match (bits, group_size) {
        (None, _) => String::new(),
        (_, None) => "row".into(),
        (_, Some(n)) => n.to_string(),
    }
}

/// The line of names and the one below it.
fn table_head(
    tasks: &[&String],
    is_text: impl Fn(&String) -> bool,
    with_questions: bool,
) -> String {
    let mut text = String::from("| method | bits | group | seeds |");
    for task in tasks {
        let unit = if is_text(task) { " (perplexity)" } else { "" };
        text += &format!(" {task}{unit} |");
    }
    text += if with_questions {
        " mean accuracy |"
    } else {
        ""
    };
    text += " mean KL |\n|---|---|---|---|";
    text += &"---|".repeat(tasks.len() + 1 + usize::from(with_questions));
    text.push('\n');
    text
}

/// Not a number where the line is of other tasks.
fn main_score(row: &SweepRow, task: &str) -> f64 {
    let main = |score: &TaskScore| score.accuracy.or(score.perplexity);
    row.tasks.get(task).and_then(main).unwrap_or(f64::NAN)
}

fn spread(rows: &[&SweepRow], digits: usize, value: impl Fn(&SweepRow) -> f64) -> String {
    let values: Vec<f64> = rows.iter().map(|r| value(r)).collect();
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    match values.len() {
        1 => format!("{mean:.digits$}"),
        _ => format!("{mean:.digits$} ({low:.digits$} to {high:.digits$})"),
    }
}

/// Empty if no method has a baseline of the same format.
fn paired_table(rows: &[SweepRow], baseline: Option<&str>) -> String {
    let all = paired(rows, baseline);
    let Some(first) = all.first() else {
        return String::new();
    };
    let mut text = format!(
        "Against {}, paired by seed; in brackets 95 % of Student's t:\n\
         | method | bits | group | pairs | KL, ratio | mean accuracy, difference | seconds, ratio |\n\
         |---|---|---|---|---|---|---|\n",
        first.baseline
    );
    for pair in &all {
        text += &format!(
            "| {} | {} | {} | {} | {} | {} | {} |\n",
            pair.method,
            pair.bits,
            group_name(Some(pair.bits), pair.group_size),
            pair.n_pairs,
            with_interval(pair.kl_ratio, 3),
            pair.accuracy_difference
                .map_or(String::new(), |interval| with_interval(interval, 1)),
            format_args!("{:.2}", pair.seconds_ratio),
        );
    }
    text
}

fn with_interval(interval: Interval, digits: usize) -> String {
    match interval.bounds {
        Some([low, high]) => format!(
            "{:.digits$} [{low:.digits$}, {high:.digits$}]",
            interval.mean
        ),
        None => format!("{:.digits$}", interval.mean),
    }
}
