//! The text that stands after the images.

use super::Benchmark;
use super::doc::Doc;
use crate::Result;
use crate::eval::metric::{Choice, Protocol, python};

const SHORT: &str = "\nAnswer the question using a single word or phrase.";
const LETTER: &str = "Answer with the option's letter from the given choices directly.";

impl Benchmark {
    /// The prompt of a row.
    ///
    /// Source: lmms-eval 0.7.3, `doc_to_text` and the yaml file of each task; VLMEvalKit
    /// `dataset/image_vqa.py`, `dataset/image_mcq.py`, `build_prompt`. Differs: no.
    pub(super) fn prompt(self, doc: Doc) -> Result<String> {
        let question = doc.text(&["question"])?;
        match doc.protocol {
            Protocol::LmmsEval => self.lmms_eval_prompt(doc, &question),
            Protocol::VlmEvalKit => self.vlm_eval_kit_prompt(doc, &question),
        }
    }

    fn lmms_eval_prompt(self, doc: Doc, question: &str) -> Result<String> {
        Ok(match self {
            Self::ChartQa => format!("{question}\nAnswer the question with a single word."),
            Self::DocVqa => format!("{question}{SHORT}"),
            Self::TextVqa => format!("{}{SHORT}", python::capitalize(question)),
            Self::VizWiz => format!(
                "{}\nWhen the provided information is insufficient, respond with \
                 'Unanswerable'.{SHORT}",
                python::capitalize(question)
            ),
            Self::MmeRealWorld => format!(
                "{question} The choices are listed below:\n{}\nSelect the best answer to the above \
                 multiple-choice question based on the image. Respond with only the letter \
                 (A, B, C, D, or E) of the correct option.\nThe best answer is: ",
                doc.texts(&["multi-choice options"])?.join("\n")
            ),
            Self::MmeRealWorldCn => format!(
                "{question} 选项如下所示:\n{}\n根据图像选择上述多项选择题的最佳答案。\
                 只需回答正确选项的字母（A, B, C, D 或 E）。\n最佳答案为： ",
                doc.texts(&["multi-choice options"])?.join("\n")
            ),
            Self::ScienceQa => {
                let context = doc.optional("hint").filter(|hint| !hint.is_empty());
                let context = context.map(|hint| format!("Context: {hint}\n"));
                let context = context.unwrap_or_default();
                format!("{context}{question}\n{}\n{LETTER}", lines(&doc.choices()?))
            }
            Self::SeedBench2Plus => {
                let mut choices = doc.choices()?;
                choices.iter_mut().for_each(|(_, text)| picture(text));
                format!("{question}\n{}\n{LETTER}", lines(&choices))
            }
            Self::OcrBench => python::strip(question).to_owned(),
        })
    }

    fn vlm_eval_kit_prompt(self, doc: Doc, question: &str) -> Result<String> {
        Ok(match self {
            Self::ChartQa | Self::DocVqa | Self::TextVqa => format!("{question}{SHORT}"),
            Self::VizWiz | Self::OcrBench => question.to_owned(),
            Self::MmeRealWorld => {
                let options = options(doc, "The choices are listed below:\n")?;
                format!(
                    "{question} {options}\nSelect the best answer to the above multiple-choice \
                     question based on the image. Respond with only the letter (A, B, C, D, or E) \
                     of the correct option. \nThe best answer is:"
                )
            }
            Self::MmeRealWorldCn => {
                let options = options(doc, "选项如下所示:\n")?;
                format!(
                    "{question} {options}\n根据图像选择上述多项选择题的最佳答案。\
                     只需回答正确选项的字母（A, B, C, D 或 E）。\n最佳答案为："
                )
            }
            Self::ScienceQa | Self::SeedBench2Plus => {
                let hint = doc.optional("hint").map(|hint| format!("Hint: {hint}\n"));
                format!(
                    "{}Question: {question}\nOptions:\n{}\nPlease select the correct answer from \
                     the options above. \n",
                    hint.unwrap_or_default(),
                    lines(&doc.choices()?)
                )
            }
        })
    }
}

/// MME-RealWorld's options: with their heading already where VLMEvalKit itself wrote the table, as
/// a list in the light version.
fn options(doc: Doc, heading: &str) -> Result<String> {
    let options = doc.texts(&["multi-choice options"])?;
    Ok(match options.as_slice() {
        [text] if text.starts_with(heading) => text.clone(),
        _ => format!("{heading}{}", options.join("\n")),
    })
}

fn lines(choices: &[Choice]) -> String {
    let lines: Vec<String> = choices
        .iter()
        .map(|(letter, text)| format!("{letter}. {text}"))
        .collect();
    lines.join("\n")
}

/// Choices that name a file are pictures that nobody shows; the mark of a place stands for them.
fn picture(text: &mut String) {
    if text.contains("jpg") || text.contains("png") {
        *text = "<image>".into();
    }
}
