//! Rows of a VLMEvalKit TSV: `index`, `image` as base64, `question`, options, `answer`, `category`.

use super::image_source::ImageSource;
use super::record::{Record, Records};
use crate::{Error, Result};
use csv::{Position, Reader, StringRecord};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

/// An `image` no longer than this is the index of the row that holds the image.
const MAX_REFERENCE_CHARS: usize = 64;

/// Images of all rows, each reference to one counted: rows may share a list, and its length then
/// counts for each.
const MAX_IMAGES: usize = 1 << 22;

/// Longest row that is read, so that a quote without its end cannot exhaust memory.
const MAX_ROW_BYTES: u64 = 512 << 20;

/// Images that may be remembered without looking whether anybody has them.
const MIN_KEPT: usize = 8;

/// The rows of `path`, whose first line names the columns. `image` may be a list of base64 texts
/// in JSON or Python notation.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] naming the row for a wrong number of columns, text that is no
/// UTF-8, a row of more than 512 MiB, or a reference to a row without an image.
pub(super) fn read(path: &Path) -> Result<Records> {
    let mut table = Table::open(path)?;
    let header = table.header()?;
    let place = |name: &str| header.iter().position(|column| column == name);
    Ok(Box::new(Rows {
        image: place("image"),
        index: place("index"),
        path: path.to_path_buf(),
        header,
        table: Some(table),
        n_rows: 0,
        images_left: MAX_IMAGES,
        kept: HashMap::new(),
        n_kept_at_most: MIN_KEPT,
        places: None,
    }))
}

/// Bytes that a row may still take.
struct Limited {
    file: File,
    left: u64,
}

impl Read for Limited {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.file.read(buffer)?;
        let left = self.left.checked_sub(n as u64);
        let too_long =
            || std::io::Error::other(format!("more than {MAX_ROW_BYTES} bytes in a row"));
        self.left = left.ok_or_else(too_long)?;
        Ok(n)
    }
}

impl std::io::Seek for Limited {
    fn seek(&mut self, to: std::io::SeekFrom) -> std::io::Result<u64> {
        self.file.seek(to)
    }
}

struct Table {
    path: PathBuf,
    reader: Reader<Limited>,
}

impl Table {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
        let left = MAX_ROW_BYTES;
        let mut builder = csv::ReaderBuilder::new();
        Ok(Self {
            path: path.to_path_buf(),
            reader: builder.delimiter(b'\t').from_reader(Limited { file, left }),
        })
    }

    fn bad(&self, at: &str, e: &csv::Error) -> Error {
        Error::format(&self.path, at, e.to_string())
    }

    fn header(&mut self) -> Result<StringRecord> {
        let header = self.reader.headers().cloned();
        header.map_err(|e| self.bad("header", &e))
    }

    /// The next row; false at the end.
    fn next(&mut self, row: &mut StringRecord, at: &str) -> Result<bool> {
        self.reader.get_mut().left = MAX_ROW_BYTES;
        let read = self.reader.read_record(row);
        read.map_err(|e| self.bad(at, &e))
    }
}

struct Rows {
    path: PathBuf,
    header: StringRecord,
    /// Columns of that name.
    image: Option<usize>,
    index: Option<usize>,
    /// None after an error.
    table: Option<Table>,
    n_rows: usize,
    images_left: usize,
    /// Images by index, as long as somebody has them.
    kept: HashMap<String, Weak<str>>,
    n_kept_at_most: usize,
    /// Where the rows are that hold an image, once a row has referred to one.
    places: Option<HashMap<String, Position>>,
}

impl Iterator for Rows {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut table = self.table.take()?;
        let record = self.next_record(&mut table).transpose();
        if matches!(record, Some(Ok(_))) {
            self.table = Some(table);
        }
        record
    }
}

impl Rows {
    fn next_record(&mut self, table: &mut Table) -> Result<Option<Record>> {
        let at = format!("row {}", self.n_rows + 1);
        let mut row = StringRecord::new();
        if !table.next(&mut row, &at)? {
            return Ok(None);
        }
        self.n_rows += 1;
        let image = self.image_of(&row, &at)?;
        let n_images = image.as_deref().map_or(0, |text| items_in(text).count());
        self.images_left = self.images_left.checked_sub(n_images).ok_or_else(|| {
            let why = format!("images beyond the {MAX_IMAGES} that a file may have");
            Error::format(&self.path, at.as_str(), why)
        })?;
        let name = format!("{} {at}: image", self.path.display());
        let cells = self.header.iter().zip(row.iter()).enumerate();
        let filled = cells.filter(|(i, (_, cell))| !cell.is_empty() && Some(*i) != self.image);
        let values: Map<String, Value> = filled
            .map(|(_, (key, cell))| (key.to_owned(), cell.into()))
            .collect();
        Ok(Some(Record {
            path: self.path.clone(),
            at,
            values,
            images: image
                .map(|text| images_in(&name, &text))
                .unwrap_or_default(),
            folder: None,
        }))
    }

    /// The text of the row's image, which may be another row's.
    fn image_of(&mut self, row: &StringRecord, at: &str) -> Result<Option<Arc<str>>> {
        let Some(text) = self
            .image
            .and_then(|i| row.get(i))
            .filter(|t| !t.is_empty())
        else {
            return Ok(None);
        };
        let index = self.index.and_then(|i| row.get(i)).unwrap_or("");
        if text.len() > MAX_REFERENCE_CHARS {
            let text: Arc<str> = text.into();
            self.keep(index, &text);
            return Ok(Some(text));
        }
        let target = text.trim();
        if let Some(text) = self.kept.get(target).and_then(Weak::upgrade) {
            return Ok(Some(text));
        }
        let found = self.look_up(target)?.ok_or_else(|| {
            let why = format!("image refers to index {text:?}, which holds no image");
            Error::format(&self.path, at, why)
        })?;
        self.keep(target, &found);
        Ok(Some(found))
    }

    /// Remembers an image that others may refer to. The memory of one that nobody has any more is
    /// free only when it is forgotten here too.
    fn keep(&mut self, index: &str, text: &Arc<str>) {
        if self.kept.len() >= self.n_kept_at_most {
            self.kept.retain(|_, text| text.strong_count() > 0);
            self.n_kept_at_most = MIN_KEPT.max(2 * self.kept.len());
        }
        self.kept.insert(index.to_owned(), Arc::downgrade(text));
    }

    /// The image that the row of that index holds.
    fn look_up(&mut self, index: &str) -> Result<Option<Arc<str>>> {
        let mut table = Table::open(&self.path)?;
        if self.places.is_none() {
            self.places = Some(self.find_places(&mut table)?);
        }
        let Some(place) = self.places.as_ref().and_then(|places| places.get(index)) else {
            return Ok(None);
        };
        let at = format!("row of index {index:?}");
        let sought = table.reader.seek(place.clone());
        sought.map_err(|e| table.bad(&at, &e))?;
        let mut row = StringRecord::new();
        table.next(&mut row, &at)?;
        Ok(self.image.and_then(|i| row.get(i)).map(Into::into))
    }

    fn find_places(&self, table: &mut Table) -> Result<HashMap<String, Position>> {
        let mut places = HashMap::new();
        let mut row = StringRecord::new();
        for i in 1.. {
            if !table.next(&mut row, &format!("row {i}"))? {
                break;
            }
            let cell = |column: Option<usize>| column.and_then(|i| row.get(i)).unwrap_or("");
            if cell(self.image).len() > MAX_REFERENCE_CHARS {
                let place = row.position().cloned();
                places.extend(place.map(|place| (cell(self.index).to_owned(), place)));
            }
        }
        Ok(places)
    }
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
        let mut rows = read(file.path()).unwrap();
        let message = rows.find_map(Result::err).unwrap().to_string();
        assert!(message.contains("row 420: images beyond"), "{message}");
    }
}
