//! How well a model answers, and how far a quantized one has moved from its original.
//!
//! Of questions, two measures: exact answers by greedy generation, and the mean Kullback–Leibler
//! divergence from the original's next-token distributions over the tokens of the right answers,
//! which sees changes long before an answer flips. Of raw texts, perplexity and the same divergence
//! over their tokens.

pub mod benchmark;
pub mod first_token;
mod generation;
pub mod metric;
mod questions;
mod sample;
mod score;
mod summary;
mod task;
mod text;

pub use generation::{WrittenText, generate_answers};
pub use questions::{QUESTIONS_AT_ONCE, QuestionSource};
pub use sample::{AnsweredQuestion, OtherAnswer, Rules, WrittenAnswer, read_answers};
pub use score::{AnswerScore, Divergence, Reference, score_answers};
pub use summary::{Pairs, RIGHT_FROM, Score, is_right};
pub use task::{EvalItem, Task, TaskItems, TaskRows, encode_questions, open_tasks, task_files};
pub use text::{TextItem, TextReference, TextScore, perplexity, score_texts};

use crate::model::LoadedModel;
use crate::model::generation::OnToken;
use crate::processor::Processor;
use crate::{Error, Result};
use first_token::FirstToken;
use serde::Serialize;
use std::collections::BTreeMap;

/// Longest answer that is generated to a question of no benchmark, in tokens.
pub const MAX_ANSWER_TOKENS: usize = 32;

/// One answered question.
#[derive(Clone, Debug, Serialize)]
pub struct Prediction {
    /// Id of the question in its file.
    pub id: String,
    /// What kind of question it is, where the file says so.
    pub category: Option<String>,
    /// The model's answer.
    pub answer: String,
    /// The same with the white space around it.
    #[serde(skip)]
    pub text: String,
    /// Of multiple choice, the letter that is likeliest to come first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token: Option<FirstToken>,
    /// The right answers.
    pub expected: Vec<String>,
    /// Whether it is one of the right ones.
    pub correct: bool,
}

/// A share with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Accuracy {
    /// Right answers.
    pub n_correct: usize,
    /// Questions.
    pub n: usize,
    /// Share in percent.
    pub percent: f64,
    /// Wilson interval at 95 %, in percent.
    pub interval: [f64; 2],
}

impl Accuracy {
    /// The share of `true`.
    pub fn of(correct: impl IntoIterator<Item = bool>) -> Self {
        let (mut n_correct, mut n) = (0, 0);
        for flag in correct {
            n += 1;
            n_correct += usize::from(flag);
        }
        let (share, count) = (n_correct as f64 / (n.max(1)) as f64, n.max(1) as f64);
        // 97.5 % quantile of the normal distribution.
        let z2 = 1.959_964f64.powi(2);
        let middle = (share + z2 / (2.0 * count)) / (1.0 + z2 / count);
        let spread = share * (1.0 - share) / count + z2 / (4.0 * count * count);
        let half = z2.sqrt() * spread.sqrt() / (1.0 + z2 / count);
        let bounds = [middle - half, middle + half];
        Self {
            n_correct,
            n,
            percent: 100.0 * share,
            interval: bounds.map(|b| 100.0 * b.clamp(0.0, 1.0)),
        }
    }

    /// Shares by group; those without one under an empty name.
    pub fn by_group<'a>(
        answers: impl Iterator<Item = (Option<&'a String>, bool)>,
    ) -> BTreeMap<String, Self> {
        let mut flags: BTreeMap<String, Vec<bool>> = BTreeMap::new();
        for (name, is_right) in answers {
            let name = name.cloned().unwrap_or_default();
            flags.entry(name).or_default().push(is_right);
        }
        flags
            .into_iter()
            .map(|(name, flags)| (name, Self::of(flags)))
            .collect()
    }
}

/// Whether `answer` is one of `expected`, letter case and white space at the ends aside.
pub fn is_correct(answer: &str, expected: &[String]) -> bool {
    let plain = |text: &str| text.trim().to_lowercase();
    expected.iter().any(|e| plain(e) == plain(answer))
}

/// Answers every question of a task, in order. `on_token` hears after each token how many
/// answers ended there, and ends the work by an error.
///
/// # Errors
/// The model's; [`Error::Missing`] for a question without a right answer.
pub fn answer_all(
    model: &LoadedModel,
    processor: &Processor,
    items: &[EvalItem],
    on_token: &OnToken,
) -> Result<Vec<Prediction>> {
    if let Some(item) = items.iter().find(|item| item.answers.is_empty()) {
        return Err(Error::Missing {
            what: "right answer".into(),
            place: item.origin.clone(),
        });
    }
    let answers = generate_answers(model, processor, items, on_token)?;
    let predictions = items.iter().zip(answers).map(|(item, written)| Prediction {
        id: item.id.clone(),
        category: item.category.clone(),
        correct: is_correct(&written.text, &item.answers),
        answer: written.text.trim().to_owned(),
        text: written.text,
        first_token: written.first_token,
        expected: item.answers.clone(),
    });
    Ok(predictions.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_compared_without_case_and_edges() {
        let expected = ["Blue".to_owned(), "teal".to_owned()];
        assert!(is_correct(" blue\n", &expected));
        assert!(is_correct("teal", &expected));
        assert!(!is_correct("light blue", &expected));
        assert!(!is_correct("", &expected));
    }

    #[test]
    fn intervals_are_wilsons() {
        let a = Accuracy::of((0..100).map(|i| i < 90));
        assert_eq!((a.n_correct, a.n, a.percent), (90, 100, 90.0));
        // Published values for 90 of 100.
        assert!((a.interval[0] - 82.56).abs() < 0.01 && (a.interval[1] - 94.48).abs() < 0.01);
        let none = Accuracy::of(std::iter::empty());
        assert_eq!(none.percent, 0.0);
    }
}
