//! Rows of a VLMEvalKit TSV: `index`, `image` as base64, `question`, options, `answer`, `category`.

use super::image_source::ImageSource;
use super::record::Record;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// An `image` no longer than this is the index of the row that holds the image.
const MAX_REFERENCE_CHARS: usize = 64;

/// The rows of `path`, whose first line names the columns. `image` may be a list of base64 texts
/// in JSON or Python notation.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] naming the row for a wrong number of columns, text that is no
/// UTF-8, or a reference to a row without an image.
pub(super) fn read(path: &Path) -> Result<Vec<Record>> {
    let file = std::fs::File::open(path).map_err(|e| Error::io(path, "open", e))?;
    let mut reader = csv::ReaderBuilder::new().delimiter(b'\t').from_reader(file);
    let bad = |at: &str, e: csv::Error| Error::format(path, at, e.to_string());
    let header = reader.headers().map_err(|e| bad("header", e))?.clone();
    let mut rows = Vec::new();
    for (i, row) in reader.records().enumerate() {
        let at = format!("row {}", i + 1);
        let row = row.map_err(|e| bad(&at, e))?;
        let cells = header.iter().zip(row.iter());
        let filled = cells.filter(|(_, cell)| !cell.is_empty());
        let values: Map<String, Value> = filled.map(|(k, v)| (k.to_owned(), v.into())).collect();
        rows.push(values);
    }
    with_images(path, rows)
}

fn with_images(path: &Path, mut rows: Vec<Map<String, Value>>) -> Result<Vec<Record>> {
    let texts: Vec<Option<Arc<str>>> = rows
        .iter_mut()
        .map(|row| match row.remove("image") {
            Some(Value::String(text)) => Some(text.into()),
            _ => None,
        })
        .collect();
    let index_of =
        |row: &Map<String, Value>| row.get("index").and_then(Value::as_str).map(str::to_owned);
    let places: HashMap<String, usize> = rows
        .iter()
        .enumerate()
        .filter_map(|(i, row)| index_of(row).map(|index| (index, i)))
        .collect();
    let mut records = Vec::with_capacity(rows.len());
    for (i, values) in rows.into_iter().enumerate() {
        let at = format!("row {}", i + 1);
        let text = match &texts[i] {
            Some(text) if text.len() <= MAX_REFERENCE_CHARS => {
                let target = places.get(text.trim()).and_then(|j| texts[*j].as_ref());
                let target = target.filter(|t| t.len() > MAX_REFERENCE_CHARS);
                Some(target.ok_or_else(|| {
                    let why = format!("image refers to index {text:?}, which holds no image");
                    Error::format(path, at.as_str(), why)
                })?)
            }
            other => other.as_ref(),
        };
        let name = format!("{} {at}: image", path.display());
        records.push(Record {
            path: path.to_path_buf(),
            at,
            values,
            images: text.map(|t| images_in(&name, t)).unwrap_or_default(),
            folder: None,
        });
    }
    Ok(records)
}

fn images_in(name: &str, text: &Arc<str>) -> Vec<ImageSource> {
    let source = |text: Arc<str>| ImageSource::Base64 {
        name: name.to_owned(),
        text,
    };
    match text
        .trim()
        .strip_prefix('[')
        .and_then(|t| t.strip_suffix(']'))
    {
        None => vec![source(Arc::clone(text))],
        Some(list) => list
            .split(',')
            .map(|item| source(item.trim().trim_matches(['"', '\'']).into()))
            .collect(),
    }
}
