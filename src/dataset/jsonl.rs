//! Rows of a JSONL file, or of a file that is one JSON array.

use super::chartqa;
use super::image_source::ImageFolder;
use super::record::{Record, Records};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longest line that is read, so that a file without line breaks cannot exhaust memory.
const MAX_LINE_BYTES: u64 = 64 << 20;
/// Largest file that is read as one JSON array.
const MAX_ARRAY_BYTES: u64 = 2 << 30;

/// The rows of `path`, line by line; blank lines are skipped.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] naming the line that is no JSON object.
pub(super) fn read(path: &Path, folder: &Arc<ImageFolder>) -> Result<Records> {
    let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
    let mut reader = BufReader::new(file);
    if starts_with_bracket(&mut reader).map_err(|e| Error::io(path, "read", e))? {
        let records = read_array(path, reader, folder)?;
        return Ok(Box::new(records.into_iter().map(Ok)));
    }
    Ok(Box::new(Lines {
        path: path.to_path_buf(),
        reader,
        folder: Arc::clone(folder),
        n_lines: 0,
    }))
}

struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    folder: Arc<ImageFolder>,
    n_lines: usize,
}

impl Iterator for Lines {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let line = match next_line(&self.path, &mut self.reader, self.n_lines) {
                Ok(line) => line?,
                Err(e) => return Some(Err(e)),
            };
            self.n_lines += 1;
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let at = format!("line {}", self.n_lines);
            let values = serde_json::from_slice(&line).map_err(|e| {
                let why = format!("a JSON object expected: {e}");
                Error::format(&self.path, at.as_str(), why)
            });
            return Some(values.map(|values| record(&self.path, at, values, &self.folder)));
        }
    }
}

/// The line after the first `n_before`; `None` at the end of the file.
pub(crate) fn next_line(
    path: &Path,
    reader: &mut impl BufRead,
    n_before: usize,
) -> Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let n = reader
        .take(MAX_LINE_BYTES + 1)
        .read_until(b'\n', &mut line)
        .map_err(|e| Error::io(path, "read", e))? as u64;
    if n > MAX_LINE_BYTES {
        let why = format!("longer than {MAX_LINE_BYTES} bytes");
        return Err(Error::format(path, format!("line {}", n_before + 1), why));
    }
    Ok((n > 0).then_some(line))
}

fn record(
    path: &Path,
    at: String,
    mut values: Map<String, Value>,
    folder: &Arc<ImageFolder>,
) -> Record {
    chartqa::rename(path, &mut values);
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
