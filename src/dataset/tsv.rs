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

/// Images of all rows, each reference to one counted: rows may share a list, and its length then
/// counts for each.
const MAX_IMAGES: usize = 1 << 22;

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
    let mut images_left = MAX_IMAGES;
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
        let n_images = text.map_or(0, |text| items_in(text).count());
        images_left = images_left.checked_sub(n_images).ok_or_else(|| {
            let why = format!("images beyond the {MAX_IMAGES} that a file may have");
            Error::format(path, at.as_str(), why)
        })?;
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
    match list_in(text) {
        None => vec![source(Arc::clone(text))],
        Some(_) => items_in(text).map(|item| source(item.into())).collect(),
    }
}

/// The base64 texts of a cell, which is a list of them or one.
fn items_in(text: &str) -> impl Iterator<Item = &str> {
    let items = list_in(text).unwrap_or("").split(',');
    items.map(|item| item.trim().trim_matches(['"', '\'']))
}

fn list_in(text: &str) -> Option<&str> {
    text.trim().strip_prefix('[')?.strip_suffix(']')
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 5000 rows that refer to a list of 10 000 images: 50 million images in 30 kB.
    #[test]
    fn references_to_a_list_do_not_multiply_without_end() {
        let mut text = format!("index\timage\n0\t[{}]\n", ",".repeat(9_999));
        for i in 1..5000 {
            text += &format!("{i}\t0\n");
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let message = read(file.path()).unwrap_err().to_string();
        assert!(message.contains("row 420: images beyond"), "{message}");
    }
}
