//! Answers one by one, in the form of lmms-eval's `--log_samples` files.

use super::Prediction;
use super::benchmark::{Asked, Benchmark, Judgement, judged_plainly};
use super::first_token::FirstToken;
use super::metric::Protocol;
use super::score::Divergence;
use crate::dataset::jsonl::next_line;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

/// A question, its answer and the score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AnsweredQuestion {
    /// Place among the questions of the task, from 0.
    pub doc_id: usize,
    /// Id in the file.
    pub id: String,
    /// The row without its images.
    pub doc: Map<String, Value>,
    /// Right answers.
    pub target: Vec<String>,
    /// The prompt's text.
    pub arguments: Vec<String>,
    /// What the model wrote.
    pub resps: Vec<Vec<String>>,
    /// What of it was judged.
    pub filtered_resps: Vec<String>,
    /// The benchmark, if it is one's.
    pub benchmark: Option<String>,
    /// Whose rules were followed.
    pub protocol: Protocol,
    /// Sub-scores that it counts in.
    pub groups: Vec<String>,
    /// From 0 to 1.
    pub score: f64,
    /// Of multiple choice, the letter that the model finds likeliest to begin its answer with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token: Option<FirstToken>,
    /// The other model's answer, where two are compared.
    pub reference: Option<OtherAnswer>,
}

/// Another model's answer to the same question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OtherAnswer {
    /// What was judged.
    pub answer: String,
    /// From 0 to 1.
    pub score: f64,
    /// How far the first model is from it on the right answer.
    pub divergence: Divergence,
}

impl AnsweredQuestion {
    /// The record of an answer.
    pub fn new(
        asked: &Asked,
        doc_id: usize,
        found: &Prediction,
        benchmark: Option<Benchmark>,
        protocol: Protocol,
    ) -> Self {
        let answer = asked.answer(&found.text);
        Self {
            doc_id,
            id: asked.question.id.clone(),
            doc: asked.doc.clone(),
            target: asked.question.answers.clone(),
            arguments: vec![asked.question.question.clone()],
            resps: vec![vec![found.text.clone()]],
            score: asked.judge.score(&answer, protocol),
            filtered_resps: vec![answer],
            benchmark: benchmark.map(|b| b.name().to_owned()),
            protocol,
            groups: asked.groups.clone(),
            first_token: found.first_token,
            reference: None,
        }
    }

    /// Whether the likeliest first letter is the right one, of multiple choice.
    pub fn is_first_token_right(&self) -> Option<bool> {
        let letter = self.first_token?.letter.to_string();
        Some(self.target.contains(&letter))
    }

    /// The answer that was judged.
    pub fn answer(&self) -> &str {
        self.filtered_resps.first().map_or("", String::as_str)
    }

    /// One line, the score also under its metric's own name.
    pub fn line(&self, metric: &str) -> String {
        let mut value = serde_json::to_value(self).expect("texts, numbers and maps by text");
        value[metric] = self.score.into();
        value.to_string()
    }
}

/// An answer that was written down, by vlmq or by another program.
#[derive(Clone, Debug, PartialEq)]
pub struct WrittenAnswer {
    /// The question's id.
    pub id: String,
    /// The answer.
    pub answer: String,
    /// What is held against it.
    pub judgement: Judgement,
    /// Its score.
    pub score: f64,
}

/// What is known of the answers in a file; what is absent is taken from each line.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules {
    /// The benchmark.
    pub benchmark: Option<Benchmark>,
    /// Whose rules to follow.
    pub protocol: Option<Protocol>,
}

/// Scores the answers of a JSONL file: lines of `--log_samples` (`doc` with the row's columns, the
/// answer in `filtered_resps` or `resps`), or rows with their answer in `prediction`.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] naming the line that is no such object; [`Error::Missing`] for
/// an absent column or answer, and for a file without lines.
pub fn read_answers(path: &Path, rules: Rules) -> Result<Vec<WrittenAnswer>> {
    let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
    let mut reader = BufReader::new(file);
    let (mut answers, mut n_lines) = (Vec::new(), 0);
    while let Some(line) = next_line(path, &mut reader, n_lines)? {
        n_lines += 1;
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let at = format!("line {n_lines}");
        let values: Map<String, Value> = serde_json::from_slice(&line).map_err(|e| {
            Error::format(path, at.as_str(), format!("a JSON object expected: {e}"))
        })?;
        answers.push(written_answer(
            &values,
            &format!("{} {at}", path.display()),
            rules,
        )?);
    }
    match answers.is_empty() {
        true => Err(Error::Missing {
            what: "answers (no line in it)".into(),
            place: path.display().to_string(),
        }),
        false => Ok(answers),
    }
}

fn written_answer(
    values: &Map<String, Value>,
    origin: &str,
    rules: Rules,
) -> Result<WrittenAnswer> {
    let text = |key: &str| values.get(key).and_then(Value::as_str);
    let nested = |key: &str| {
        let mut value = values.get(key)?;
        while let Some(first) = value.as_array().and_then(|items| items.first()) {
            value = first;
        }
        value.as_str()
    };
    let answer = nested("filtered_resps").or_else(|| nested("resps"));
    let answer = answer.or_else(|| text("prediction"));
    let answer = answer.ok_or_else(|| Error::Missing {
        what: "an answer: filtered_resps, resps or prediction".into(),
        place: origin.to_owned(),
    })?;
    let benchmark = match (rules.benchmark, text("benchmark")) {
        (None, Some(name)) => Some(Benchmark::from_name(name)?),
        (given, _) => given,
    };
    let own = values.get("protocol").cloned();
    let own = own.and_then(|value| serde_json::from_value(value).ok());
    let protocol = rules.protocol.or(own).unwrap_or_default();
    let doc = values
        .get("doc")
        .and_then(Value::as_object)
        .unwrap_or(values);
    let judgement = match benchmark {
        Some(benchmark) => benchmark.judged(doc, origin, protocol)?,
        None => judged_plainly(doc, origin)?,
    };
    let ids = ["id", "doc_id", "index", "question_id", "questionId"];
    let id = ids
        .iter()
        .find_map(|key| values.get(*key).or_else(|| doc.get(*key)));
    Ok(WrittenAnswer {
        id: id.map_or_else(|| origin.to_owned(), plain),
        score: judgement.judge.score(answer, protocol),
        answer: answer.to_owned(),
        judgement,
    })
}

fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn score(line: Value, rules: Rules) -> Result<WrittenAnswer> {
        written_answer(line.as_object().unwrap(), "a.jsonl line 1", rules)
    }

    #[test]
    fn answers_are_found_in_every_form() {
        let rules = Rules {
            benchmark: Some(Benchmark::DocVqa),
            protocol: None,
        };
        let doc = json!({"questionId": "7", "answers": ["Yes"]});
        for line in [
            json!({"doc": doc, "filtered_resps": ["yes"], "resps": [["no"]]}),
            json!({"doc": doc, "resps": [["yes"]]}),
            json!({"questionId": "7", "answers": ["Yes"], "prediction": "yes"}),
        ] {
            let found = score(line, rules).unwrap();
            assert_eq!((found.score, found.id.as_str()), (1.0, "7"));
        }
        let own = json!({"benchmark": "chartqa", "doc": {"answer": "100", "type": "x"},
            "filtered_resps": ["104"]});
        let found = score(own, Rules::default()).unwrap();
        assert_eq!(found.judgement.groups, ["relaxed_augmented_split"]);
        assert_eq!(found.score, 1.0);
    }

    #[test]
    fn absent_columns_are_named() {
        let rules = Rules {
            benchmark: Some(Benchmark::ChartQa),
            protocol: None,
        };
        let message = |line| score(line, rules).unwrap_err().to_string();
        let found = message(json!({"answer": "1", "prediction": "1"}));
        assert_eq!(found, "missing column type or split in a.jsonl line 1");
        let found = message(json!({"answer": "1", "type": "x"}));
        assert!(found.contains("missing an answer"), "{found}");
        let found = message(json!({"answer": [], "prediction": "1"}));
        assert!(found.contains("at least one text"), "{found}");
    }
}
