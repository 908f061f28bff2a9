//! `vlmq score`

use super::eval::{ProtocolArg, name_width, question_rows, score_head};
use super::{Done, SCHEMA};
use crate::Error;
use crate::eval::benchmark::Benchmark;
use crate::eval::{Pairs, Rules, Score, WrittenAnswer, is_right, read_answers};
use serde_json::{Value, json};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Args {
    /// Answers: a samples_*.jsonl of `vlmq eval --output` or of lmms-eval's --log_samples, or JSONL
    /// rows with their answer in `prediction`
    #[arg(value_name = "SAMPLES.jsonl")]
    samples: PathBuf,
    /// Another model's answers to the same questions in the same order
    #[arg(long, value_name = "SAMPLES.jsonl")]
    against: Option<PathBuf>,
    /// The benchmark whose questions they are; absent: what the lines say, else exact answers
    #[arg(long, value_name = "BENCHMARK")]
    benchmark: Option<String>,
    /// Whose metrics; absent: what the lines say, else lmms-eval's
    #[arg(long, value_enum)]
    protocol: Option<ProtocolArg>,
    /// Seed of the resampling that intervals come from
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
}

pub fn run(args: &Args) -> anyhow::Result<Done> {
    let benchmark = args.benchmark.as_deref().map(Benchmark::from_name);
    let rules = Rules {
        benchmark: benchmark.transpose()?,
        protocol: args.protocol.map(Into::into),
    };
    let own = read_answers(&args.samples, rules)?;
    let scores: Vec<f64> = own.iter().map(|a| a.score).collect();
    let groups = own.iter().map(|a| (a.judgement.groups.as_slice(), a.score));
    let mut row = json!({
        "score": Score::of(&scores, args.seed),
        "groups": Score::by_group(groups, args.seed),
    });
    if let Some(path) = &args.against {
        let other = read_answers(path, rules)?;
        let is_same = |(a, b): (&WrittenAnswer, &WrittenAnswer)| {
            a.id == b.id && a.judgement.judge == b.judgement.judge
        };
        if own.len() != other.len() || !own.iter().zip(&other).all(is_same) {
            return Err(Error::Invalid {
                what: format!("{} and {}", args.samples.display(), path.display()),
                why: "answers to the same questions in the same order expected".into(),
            }
            .into());
        }
        compare(&mut row, &own, &other, args.seed);
    }
    let text = table(&row);
    row["schema"] = SCHEMA.into();
    row["command"] = "score".into();
    row["scores"] = json!(scores);
    Ok(Done::new(row, text))
}

fn compare(row: &mut Value, own: &[WrittenAnswer], other: &[WrittenAnswer], seed: u64) {
    let both = || own.iter().zip(other);
    let pairs: Vec<(f64, f64)> = both().map(|(a, b)| (a.score, b.score)).collect();
    row["pairs"] = json!(Pairs::of(&pairs, seed));
    let flipped = both().filter(|(a, b)| is_right(a.score) != is_right(b.score));
    let flipped = flipped.map(|(a, b)| {
        json!({
            "id": a.id,
            "expected": a.judgement.judge.answers(),
            "answer": a.answer,
            "score": a.score,
            "reference_answer": b.answer,
            "reference_score": b.score,
        })
    });
    row["flipped"] = flipped.collect();
}

fn table(row: &Value) -> String {
    let width = name_width([("all", row)].into_iter());
    score_head("", width) + &question_rows("all", row, width)
}
