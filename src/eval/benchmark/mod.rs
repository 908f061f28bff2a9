//! The benchmarks that vision-language models are compared by: what is asked of each row, how long
//! an answer may be, and what is held against it.
//!
//! Prompts, limits and sub-scores are those of lmms-eval 0.7.3 (`tasks/*`, the `default` prompts)
//! or of VLMEvalKit (ms-vlmeval 0.0.20, the data sets' own prompts: many of its models have
//! others).

mod doc;
mod judge;
mod literal;
mod prompt;

use crate::dataset::{Question, Row};
use crate::eval::metric::{Judge, Protocol, python};
use crate::{Error, Result};
use doc::Doc;
use serde_json::{Map, Value};

/// A published set of questions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Benchmark {
    /// ChartQA, test.
    ChartQa,
    /// DocVQA, validation.
    DocVqa,
    /// TextVQA, validation.
    TextVqa,
    /// VizWiz-VQA, validation.
    VizWiz,
    /// MME-RealWorld in English, or its light version.
    MmeRealWorld,
    /// MME-RealWorld in Chinese.
    MmeRealWorldCn,
    /// ScienceQA, test, with or without images.
    ScienceQa,
    /// SEED-Bench-2-Plus.
    SeedBench2Plus,
    /// OCRBench.
    OcrBench,
}

/// Names on the command line.
const NAMES: [(&str, Benchmark); 9] = [
    ("chartqa", Benchmark::ChartQa),
    ("docvqa", Benchmark::DocVqa),
    ("textvqa", Benchmark::TextVqa),
    ("vizwiz", Benchmark::VizWiz),
    ("mme-realworld", Benchmark::MmeRealWorld),
    ("mme-realworld-cn", Benchmark::MmeRealWorldCn),
    ("scienceqa", Benchmark::ScienceQa),
    ("seedbench-2-plus", Benchmark::SeedBench2Plus),
    ("ocrbench", Benchmark::OcrBench),
];

/// Where lmms-eval sets no limit, its Qwen2-VL model's counts.
const LMMS_EVAL_DEFAULT_TOKENS: usize = 128;
/// VLMEvalKit leaves limits to its models; this is its Qwen2-VL's.
const VLM_EVAL_KIT_TOKENS: usize = 2048;

/// A question, and what becomes of the answer.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The prompt, its images and the right answers.
    pub question: Question,
    /// What is held against the answer.
    pub judge: Judge,
    /// Sub-scores that it counts in.
    pub groups: Vec<String>,
    /// The row without its images.
    pub doc: Map<String, Value>,
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
    /// Of multiple choice, the letters of the options.
    pub letters: Vec<char>,
    /// An answer ends where this begins.
    pub stop: Option<&'static str>,
}

impl Asked {
    /// What is judged of the text that a model wrote.
    pub fn answer(&self, text: &str) -> String {
        let end = self.stop.and_then(|stop| text.find(stop));
        python::strip(&text[..end.unwrap_or(text.len())]).to_owned()
    }
}

/// What is held against an answer to a row, and the sub-scores that it counts in.
#[derive(Clone, Debug, PartialEq)]
pub struct Judgement {
    /// What is held against it.
    pub judge: Judge,
    /// Sub-scores.
    pub groups: Vec<String>,
}

impl Benchmark {
    /// The benchmark of that name.
    ///
    /// # Errors
    /// [`Error::Invalid`] with all names if there is none.
    pub fn from_name(name: &str) -> Result<Self> {
        let found = NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, benchmark)| *benchmark).ok_or_else(|| {
            let names = NAMES.map(|(name, _)| name).join(", ");
            Error::Invalid {
                what: format!("benchmark {name:?}"),
                why: format!("one of {names} expected"),
            }
        })
    }

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        let found = NAMES.iter().find(|(_, benchmark)| *benchmark == self);
        found.map_or("", |(name, _)| name)
    }

    /// What the program that is followed calls its main score.
    pub fn metric(self, protocol: Protocol) -> &'static str {
        if protocol == Protocol::VlmEvalKit {
            return match self {
                Self::OcrBench => "Final Score Norm",
                _ => "Overall",
            };
        }
        match self {
            Self::ChartQa => "relaxed_overall",
            Self::DocVqa => "anls",
            Self::TextVqa | Self::VizWiz | Self::ScienceQa => "exact_match",
            Self::MmeRealWorld | Self::MmeRealWorldCn => "mme_realworld_score",
            Self::SeedBench2Plus => "seedbench_2_plus_all",
            Self::OcrBench => "ocrbench_accuracy",
        }
    }

    /// Longest answer, in tokens.
    pub fn max_new_tokens(self, protocol: Protocol) -> usize {
        if protocol == Protocol::VlmEvalKit {
            return VLM_EVAL_KIT_TOKENS;
        }
        match self {
            Self::ChartQa
            | Self::MmeRealWorld
            | Self::MmeRealWorldCn
            | Self::ScienceQa
            | Self::SeedBench2Plus => 16,
            Self::DocVqa => 32,
            Self::TextVqa | Self::VizWiz => LMMS_EVAL_DEFAULT_TOKENS,
            Self::OcrBench => 128,
        }
    }

    fn stop(self, protocol: Protocol) -> Option<&'static str> {
        let has_stop = matches!(self, Self::TextVqa | Self::VizWiz | Self::SeedBench2Plus);
        (has_stop && protocol == Protocol::LmmsEval).then_some("ASSISTANT:")
    }

    /// What a row asks. `None` for a row without image where VLMEvalKit leaves it out.
    ///
    /// # Errors
    /// [`Error::Missing`] naming the column that is absent, [`Error::Invalid`] for one of another
    /// kind; as [`Row::images`].
    pub fn asked(self, row: Row, protocol: Protocol) -> Result<Option<Asked>> {
        let (id, origin, images) = (row.id(), row.origin(), row.images()?);
        if images.is_empty() {
            if protocol == Protocol::VlmEvalKit {
                return Ok(None);
            }
            if self != Self::ScienceQa {
                return Err(Error::Missing {
                    what: "image".into(),
                    place: origin,
                });
            }
        }
        let is_of_table = row.is_of_table();
        let mut values = row.into_values();
        if is_of_table {
            doc::read_cells(&mut values, protocol);
        }
        let doc = Doc {
            values: &values,
            origin: &origin,
            protocol,
        };
        let (prompt, judgement) = (self.prompt(doc)?, self.judgement(doc)?);
        let letters = self.letters(doc)?;
        let category = judgement.groups.first().cloned();
        Ok(Some(Asked {
            question: Question {
                id,
                origin: origin.clone(),
                images,
                question: prompt,
                answers: judgement.judge.answers(),
                category,
            },
            judge: judgement.judge,
            groups: judgement.groups,
            letters,
            doc: values,
            max_new_tokens: self.max_new_tokens(protocol),
            stop: self.stop(protocol),
        }))
    }

    /// What is held against an answer to a row that was written down; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`Benchmark::asked`].
    pub fn judged(
        self,
        values: &Map<String, Value>,
        origin: &str,
        protocol: Protocol,
    ) -> Result<Judgement> {
        self.judgement(Doc {
            values,
            origin,
            protocol,
        })
    }
}

impl Asked {
    /// A question of no benchmark: it stands as it is, and one of its answers is to be given.
    ///
    /// # Errors
    /// As [`Row::into_question`]; [`Error::Missing`] without a right answer.
    pub fn plainly(row: Row, max_new_tokens: usize) -> Result<Self> {
        let mut doc = row.values().clone();
        doc.retain(|_, value| !value.is_array());
        let question = row.into_question()?;
        if question.answers.is_empty() {
            return Err(Error::Missing {
                what: "right answer".into(),
                place: question.origin,
            });
        }
        for (key, value) in [
            ("question", question.question.clone().into()),
            ("answers", question.answers.clone().into()),
        ] {
            doc.insert(key.into(), value);
        }
        Ok(Self {
            judge: Judge::Exact(question.answers.clone()),
            groups: vec![question.category.clone().unwrap_or_default()],
            question,
            doc,
            max_new_tokens,
            letters: Vec::new(),
            stop: None,
        })
    }
}

/// What is held against the answer to a row that [`Asked::plainly`] wrote down.
///
/// # Errors
/// [`Error::Missing`] if it has no right answer.
pub fn judged_plainly(values: &Map<String, Value>, origin: &str) -> Result<Judgement> {
    let doc = Doc {
        values,
        origin,
        protocol: Protocol::LmmsEval,
    };
    let answers = doc.answers()?;
    Ok(Judgement {
        judge: Judge::Exact(answers),
        groups: vec![doc.optional("category").unwrap_or_default()],
    })
}
