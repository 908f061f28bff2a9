//! Columns of a row, by the names that the sets' publishers gave them.

use super::literal::{list, pandas_reads_nothing};
use crate::dataset::text_of;
use crate::eval::metric::{Choice, Protocol};
use crate::{Error, Result};
use serde_json::{Map, Value};

/// Columns whose cells may be lists in Python's notation.
const LISTS: [&str; 4] = ["answer", "answers", "multi-choice options", "choices"];

/// Makes the cells of a TSV what the program that is followed makes of them: Python's lists are
/// read as lists, and VLMEvalKit's reader sees nothing in cells such as "None" or "NA".
pub(super) fn read_cells(values: &mut Map<String, Value>, protocol: Protocol) {
    if protocol == Protocol::VlmEvalKit {
        let is_nothing = |value: &Value| value.as_str().is_some_and(pandas_reads_nothing);
        values.retain(|key, value| key == "answer" || !is_nothing(value));
        if let Some(answer) = values.get_mut("answer").filter(|value| is_nothing(value)) {
            // What str() makes of a missing cell.
            *answer = "nan".into();
        }
    }
    for key in LISTS {
        if let Some(value) = values.get_mut(key)
            && let Some(items) = value.as_str().and_then(list)
        {
            *value = items.into();
        }
    }
}

/// A row's values, and where they stand.
#[derive(Clone, Copy)]
pub(super) struct Doc<'a> {
    pub values: &'a Map<String, Value>,
    pub origin: &'a str,
    pub protocol: Protocol,
}

impl Doc<'_> {
    fn missing(&self, what: &str) -> Error {
        Error::Missing {
            what: format!("column {what}"),
            place: self.origin.to_owned(),
        }
    }

    fn bad(&self, key: &str, why: &str) -> Error {
        Error::Invalid {
            what: format!("{}: {key}", self.origin),
            why: why.to_owned(),
        }
    }

    /// The first of these columns that is there.
    fn first(&self, keys: &[&str]) -> Option<&Value> {
        let values = keys.iter().filter_map(|key| self.values.get(*key));
        values.into_iter().find(|value| !value.is_null())
    }

    /// A text, or a number as one, if it is there.
    pub fn optional(&self, key: &str) -> Option<String> {
        self.first(&[key]).and_then(text_of)
    }

    /// The first of these columns, as a text.
    pub fn text(&self, keys: &[&str]) -> Result<String> {
        let value = self.first(keys);
        let value = value.ok_or_else(|| self.missing(&keys.join(" or ")))?;
        text_of(value).ok_or_else(|| self.bad(&keys.join(" or "), "a text expected, a list found"))
    }

    /// The first of these columns, as texts; a text alone is one.
    pub fn texts(&self, keys: &[&str]) -> Result<Vec<String>> {
        let value = self.first(keys);
        let value = value.ok_or_else(|| self.missing(&keys.join(" or ")))?;
        let texts = match value {
            Value::Array(items) => items.iter().map(text_of).collect(),
            Value::String(text) if self.protocol == Protocol::VlmEvalKit => {
                Some(list(text).unwrap_or_else(|| vec![text.clone()]))
            }
            _ => text_of(value).map(|text| vec![text]),
        };
        let texts: Option<Vec<String>> = texts;
        let why = "a list of at least one text expected";
        let texts = texts.filter(|texts| !texts.is_empty());
        texts.ok_or_else(|| self.bad(&keys.join(" or "), why))
    }

    /// Right answers.
    pub fn answers(&self) -> Result<Vec<String>> {
        self.texts(&["answers", "answer"])
    }

    /// The options of a multiple choice with their letters: a list, or a column for each.
    pub fn choices(&self) -> Result<Vec<Choice>> {
        if self.first(&["choices"]).is_some() {
            return Ok(('A'..='Z').zip(self.texts(&["choices"])?).collect());
        }
        let option = |letter: char| {
            let keys = [letter.to_string(), format!("choice_{letter}")];
            let text = keys.iter().find_map(|key| self.optional(key));
            text.map(|text| (letter, text))
        };
        let choices: Vec<Choice> = ('A'..='Z').filter_map(option).collect();
        match choices.is_empty() {
            true => Err(self.missing("choices, A to Z or choice_A to choice_Z")),
            false => Ok(choices),
        }
    }

    /// The letter of the right option, which may stand as its number, counted from 0.
    pub fn letter(&self, n_choices: usize) -> Result<String> {
        let Some(place) = self.values.get("answer").and_then(Value::as_u64) else {
            return self.text(&["answer"]);
        };
        let letter = ('A'..='Z').take(n_choices).nth(place.min(26) as usize);
        let letter = letter.map(String::from);
        letter.ok_or_else(|| self.bad("answer", "the number of one of the choices expected"))
    }
}
