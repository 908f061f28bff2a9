//! Right answers, and the sub-scores that an answer counts in.

use super::doc::Doc;
use super::{Benchmark, Judgement};
use crate::Result;
use crate::eval::metric::{Judge, Protocol};

/// OCRBench's kind whose answers are formulas, and the data set that lmms-eval knows it by.
const FORMULAS: &str = "Handwritten Mathematical Expression Recognition";
const FORMULA_SET: &str = "HME100k";
/// OCRBench's kinds that are reported as one.
const RECOGNITION: [&str; 6] = [
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
];

impl Benchmark {
    pub(super) fn judgement(self, doc: Doc) -> Result<Judgement> {
        let judge = match self {
            Self::ChartQa => Judge::Relaxed(doc.answers()?),
            Self::DocVqa => Judge::Anls(doc.answers()?),
            Self::TextVqa | Self::VizWiz => Judge::Vqa(doc.answers()?),
            Self::MmeRealWorld | Self::MmeRealWorldCn => {
                Judge::MmeRealWorld(doc.text(&["answer"])?)
            }
            Self::OcrBench => Judge::OcrBench {
                answers: doc.answers()?,
                is_formula: is_formula(doc),
            },
            Self::ScienceQa | Self::SeedBench2Plus => self.choice(doc)?,
        };
        let groups = match doc.protocol {
            Protocol::LmmsEval => self.lmms_eval_groups(doc)?,
            Protocol::VlmEvalKit => self.vlm_eval_kit_groups(doc)?,
        };
        Ok(Judgement { judge, groups })
    }

    fn choice(self, doc: Doc) -> Result<Judge> {
        if self == Self::SeedBench2Plus && doc.protocol == Protocol::LmmsEval {
            return Ok(Judge::SeedBench(doc.text(&["answer"])?));
        }
        let choices = doc.choices()?;
        let answer = doc.letter(choices.len())?;
        Ok(match doc.protocol {
            Protocol::LmmsEval => Judge::ScienceQa(answer),
            Protocol::VlmEvalKit => Judge::Option { answer, choices },
        })
    }

    /// The letters of a row's options; none where it is no multiple choice.
    pub(super) fn letters(self, doc: Doc) -> Result<Vec<char>> {
        Ok(match self {
            Self::MmeRealWorld | Self::MmeRealWorldCn => ('A'..='E').collect(),
            Self::ScienceQa | Self::SeedBench2Plus => {
                doc.choices()?.iter().map(|(letter, _)| *letter).collect()
            }
            _ => Vec::new(),
        })
    }

    fn lmms_eval_groups(self, doc: Doc) -> Result<Vec<String>> {
        Ok(match self {
            Self::ChartQa => {
                let split = doc.text(&["type", "split"])?;
                let is_human = matches!(split.as_str(), "human_test" | "test_human");
                vec![match is_human {
                    true => "relaxed_human_split".into(),
                    false => "relaxed_augmented_split".into(),
                }]
            }
            Self::MmeRealWorld | Self::MmeRealWorldCn => real_world_groups(doc)?,
            Self::SeedBench2Plus => {
                let kind = doc.text(&["question_image_type", "category"])?;
                let kind = crate::eval::metric::python::capitalize(&kind);
                vec![format!("seedbench_2_plus_{kind}")]
            }
            Self::OcrBench => ocr_groups(doc)?,
            Self::DocVqa | Self::TextVqa | Self::VizWiz | Self::ScienceQa => Vec::new(),
        })
    }

    fn vlm_eval_kit_groups(self, doc: Doc) -> Result<Vec<String>> {
        Ok(match self {
            Self::MmeRealWorld | Self::MmeRealWorldCn => real_world_groups(doc)?,
            Self::OcrBench => ocr_groups(doc)?,
            Self::ScienceQa | Self::SeedBench2Plus => {
                let keys = ["split", "l2-category", "category"].into_iter();
                keys.filter_map(|key| doc.optional(key)).collect()
            }
            Self::VizWiz => Vec::new(),
            Self::ChartQa | Self::DocVqa | Self::TextVqa => {
                let kind = ["split", "type", "category"].into_iter();
                let kind = kind.into_iter().find_map(|key| doc.optional(key));
                kind.into_iter().collect()
            }
        })
    }
}

fn is_formula(doc: Doc) -> bool {
    let set = doc.optional("dataset");
    match set.filter(|_| doc.protocol == Protocol::LmmsEval) {
        Some(set) => set == FORMULA_SET,
        None => ["category", "question_type"]
            .iter()
            .find_map(|key| doc.optional(key))
            .is_some_and(|kind| kind == FORMULAS),
    }
}

fn ocr_groups(doc: Doc) -> Result<Vec<String>> {
    let kind = doc.text(&["question_type", "category"])?;
    let is_recognition = RECOGNITION.contains(&kind.as_str());
    let together = is_recognition.then(|| "Text Recognition".to_owned());
    Ok([kind].into_iter().chain(together).collect())
}

/// Task, subtask and kind; attributes of whatever are one kind.
fn real_world_groups(doc: Doc) -> Result<Vec<String>> {
    let category = doc.text(&["category"])?;
    let task = match category.to_lowercase().contains("perception") {
        true => "Perception",
        false => "Reasoning",
    };
    let subtask = category.rsplit('/').next().unwrap_or_default();
    let mut kind = doc.text(&["l2-category"])?.to_lowercase();
    if kind.contains("attribute") {
        kind = format!("{}/attribute", kind.split('/').next().unwrap_or_default());
    }
    Ok(vec![
        task.into(),
        format!("{task}/{subtask}"),
        format!("{task}/{subtask}/{kind}"),
    ])
}
