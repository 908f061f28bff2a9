//! How right an answer is, by the rules that each benchmark's scores are published under.
//!
//! Two programs are followed to the letter, quirks included: lmms-eval, and VLMEvalKit. A score
//! here is the score there; `tests/oracle/test_metrics.py` runs both programs' own code beside this
//! one.

mod anls;
mod contractions;
mod letter;
mod ocr;
mod option;
pub(crate) mod python;
mod relaxed;
mod vqa;

pub use option::Choice;

use serde::{Deserialize, Serialize};

/// Whose prompts and rules are followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// lmms-eval 0.7.3.
    #[default]
    #[serde(rename = "lmms-eval")]
    LmmsEval,
    /// VLMEvalKit, as packaged in ms-vlmeval 0.0.20; multiple choice by exact matching, no judge.
    VlmEvalKit,
}

/// What is held against a prediction, and how.
#[derive(Clone, Debug, PartialEq)]
pub enum Judge {
    /// One of the answers, letter case and white space at the ends aside.
    Exact(Vec<String>),
    /// Similarity with the nearest answer.
    Anls(Vec<String>),
    /// Numbers within 5 % of one of the answers, else the same text.
    Relaxed(Vec<String>),
    /// Share of answers, clean-up included.
    Vqa(Vec<String>),
    /// Containment of one of the answers.
    OcrBench {
        /// What may be contained.
        answers: Vec<String>,
        /// Whether it is a formula, whose blanks and case are read otherwise.
        is_formula: bool,
    },
    /// The letter of MME-RealWorld.
    MmeRealWorld(String),
    /// The letter of ScienceQA.
    ScienceQa(String),
    /// The letter of SEED-Bench-2-Plus.
    SeedBench(String),
    /// VLMEvalKit's matching of options, for any multiple choice.
    Option {
        /// The right letter.
        answer: String,
        /// Letters and texts that there are to choose from.
        choices: Vec<Choice>,
    },
}

impl Judge {
    /// The right answers, to be shown and to be laid before a model.
    pub fn answers(&self) -> Vec<String> {
        match self {
            Self::Exact(answers)
            | Self::Anls(answers)
            | Self::Relaxed(answers)
            | Self::Vqa(answers)
            | Self::OcrBench { answers, .. } => answers.clone(),
            Self::MmeRealWorld(answer)
            | Self::ScienceQa(answer)
            | Self::SeedBench(answer)
            | Self::Option { answer, .. } => vec![answer.clone()],
        }
    }

    /// The prediction's score, from 0 to 1. lmms-eval judges predictions without white space at
    /// their ends, so that is cut off under its protocol.
    ///
    /// # Example
    /// ```
    /// use vlmq::eval::metric::{Judge, Protocol};
    /// let judge = Judge::Anls(vec!["ITC Limited".into()]);
    /// assert_eq!(judge.score("itc limited", Protocol::LmmsEval), 1.0);
    /// ```
    pub fn score(&self, prediction: &str, protocol: Protocol) -> f64 {
        let prediction = match protocol {
            Protocol::LmmsEval => python::strip(prediction),
            Protocol::VlmEvalKit => prediction,
        };
        let flag = |is_correct: bool| f64::from(u8::from(is_correct));
        match self {
            Self::Exact(answers) => flag(super::is_correct(prediction, answers)),
            Self::Anls(answers) => anls::score(prediction, answers),
            Self::Relaxed(answers) => {
                // VLMEvalKit strips for this metric only.
                let prediction = python::strip(prediction);
                flag(answers.iter().any(|a| relaxed::is_correct(prediction, a)))
            }
            Self::Vqa(answers) => vqa::score(prediction, answers, protocol),
            Self::OcrBench {
                answers,
                is_formula,
            } => flag(ocr::is_contained(
                prediction,
                answers,
                *is_formula,
                protocol,
            )),
            Self::MmeRealWorld(answer) => flag(letter::mme_realworld(prediction, answer, protocol)),
            Self::ScienceQa(answer) => flag(letter::scienceqa(prediction, answer)),
            Self::SeedBench(answer) => flag(letter::seedbench(prediction, answer)),
            Self::Option { answer, choices } => {
                flag(answer.chars().eq([option::meant(prediction, choices)]))
            }
        }
    }
}
