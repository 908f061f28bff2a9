//! Rows of a JSONL file, or of a file that is one JSON array.

use super::image_source::ImageFolder;
use super::record::Record;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

/// Longest line that is read, so that a file without line breaks cannot exhaust memory.
const MAX_LINE_BYTES: u64 = 64 << 20;
/// Largest file that is read as one JSON array.
const MAX_ARRAY_BYTES: u64 = 2 << 30;

/// The rows of `path`; blank lines are skipped.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] naming the line that is no JSON object.
pub(super) fn read(path: &Path, folder: &Arc<ImageFolder>) -> Result<Vec<Record>> {
    let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
    let mut reader = BufReader::new(file);
    if starts_with_bracket(&mut reader).map_err(|e| Error::io(path, "read", e))? {
        return read_array(path, reader, folder);
    }
    let mut records = Vec::new();
    for line_number in 1.. {
        let at = format!("line {line_number}");
        let mut line = Vec::new();
        let mut limited = (&mut reader).take(MAX_LINE_BYTES + 1);
        let n = limited.read_until(b'\n', &mut line);
        let n = n.map_err(|e| Error::io(path, "read", e))? as u64;
        if n == 0 {
            break;
        }
        if n > MAX_LINE_BYTES {
            let why = format!("longer than {MAX_LINE_BYTES} bytes");
            return Err(Error::format(path, at, why));
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let values: Map<String, Value> = serde_json::from_slice(&line).map_err(|e| {
            Error::format(path, at.as_str(), format!("a JSON object expected: {e}"))
        })?;
        records.push(record(path, at, values, folder));
    }
    Ok(records)
}

fn record(
    path: &Path,
    at: String,
    values: Map<String, Value>,
    folder: &Arc<ImageFolder>,
) -> Record {
    Record {
        path: path.to_path_buf(),
        at,
        values,
        images: Vec::new(),
        folder: Some(Arc::clone(folder)),
    }
}

fn starts_with_bracket(reader: &mut impl BufRead) -> std::io::Result<bool> {
    let start = reader.fill_buf()?;
    let first = start.iter().find(|b| !b.is_ascii_whitespace());
    Ok(first == Some(&b'['))
}

fn read_array(path: &Path, reader: impl Read, folder: &Arc<ImageFolder>) -> Result<Vec<Record>> {
    let limited = reader.take(MAX_ARRAY_BYTES);
    let rows: Vec<Map<String, Value>> = serde_json::from_reader(limited)
        .map_err(|e| Error::format(path, "JSON array", format!("objects expected: {e}")))?;
    let rows = rows.into_iter().enumerate();
    Ok(rows
        .map(|(i, values)| record(path, format!("row {}", i + 1), values, folder))
        .collect())
}
