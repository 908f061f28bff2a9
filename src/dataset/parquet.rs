//! Rows of a parquet file as Hugging Face writes it: images are structs of `bytes` and `path`.

use super::image_source::{ImageFolder, ImageSource};
use super::parquet_layout::{check_pages, check_schema};
use super::record::{Record, Records};
use crate::{Error, Result};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Map, Value};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of text in all rows together, and bytes for each one of the file: a dictionary lets rows
/// share a text, but here each has its own.
const MIN_TEXT_BYTES: u64 = 256 << 20;
const TEXT_BYTES_PER_BYTE: u64 = 64;

/// The rows of `path`, one at a time: of a row group at most what its pages unpack to is in memory.
///
/// # Errors
/// [`Error::Io`]; [`Error::Format`] naming the row where the file is damaged; whatever
/// [`ImageFolder::resolve`] says of an image that is given by name only.
pub(super) fn read(path: &Path, folder: &Arc<ImageFolder>) -> Result<Records> {
    let rows = unless_it_panics(path, || open(path))?;
    Ok(Box::new(Rows {
        path: path.to_path_buf(),
        folder: Arc::clone(folder),
        text_left: rows
            .n_bytes
            .saturating_mul(TEXT_BYTES_PER_BYTE)
            .max(MIN_TEXT_BYTES),
        rows: Some(rows.rows),
        n_rows: 0,
    }))
}

/// The parquet crate asserts some properties of a file that a damaged one lacks.
fn unless_it_panics<T>(path: &Path, f: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f))
        .unwrap_or_else(|_| Err(Error::format(path, "pages", "damaged parquet data")))
}

struct Opened {
    rows: RowIter<'static>,
    n_bytes: u64,
}

fn open(path: &Path) -> Result<Opened> {
    let fail = |e| Error::io(path, "open", e);
    let mut file = std::fs::File::open(path).map_err(fail)?;
    let n_bytes = file.metadata().map_err(fail)?.len();
    check_schema(path, &mut file)?;
    let bad = |at: &str, e: ParquetError| Error::format(path, at, e.to_string());
    let reader = SerializedFileReader::new(file.try_clone().map_err(fail)?);
    let reader = reader.map_err(|e| bad("footer", e))?;
    check_pages(path, &file, reader.metadata())?;
    let rows = RowIter::from_file_into(Box::new(reader));
    Ok(Opened { rows, n_bytes })
}

struct Rows {
    path: PathBuf,
    folder: Arc<ImageFolder>,
    /// Bytes of text that the file may still unpack to.
    text_left: u64,
    /// None after an error, at which the parquet crate leaves off in the middle of something.
    rows: Option<RowIter<'static>>,
    n_rows: usize,
}

impl Rows {
    fn next_record(&mut self, rows: &mut RowIter<'static>) -> Result<Option<Record>> {
        let at = format!("row {}", self.n_rows + 1);
        let Some(row) = rows.next() else {
            return Ok(None);
        };
        let row = row.map_err(|e| Error::format(&self.path, at.as_str(), e.to_string()))?;
        self.n_rows += 1;
        record(&self.path, at, row, &self.folder, &mut self.text_left).map(Some)
    }
}

impl Iterator for Rows {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut rows = self.rows.take()?;
        let path = self.path.clone();
        let record = unless_it_panics(&path, || self.next_record(&mut rows)).transpose();
        if matches!(record, Some(Ok(_))) {
            self.rows = Some(rows);
        }
        record
    }
}

fn record(
    path: &Path,
    at: String,
    row: Row,
    folder: &Arc<ImageFolder>,
    text_left: &mut u64,
) -> Result<Record> {
    let origin = format!("{} {at}", path.display());
    let mut record = Record {
        path: path.to_path_buf(),
        at,
        values: Map::new(),
        images: Vec::new(),
        folder: Some(Arc::clone(folder)),
    };
    for (name, field) in row.into_columns() {
        let found = record.images.len();
        let mut context = Context {
            origin: &origin,
            folder,
            images: &mut record.images,
            text_left,
        };
        let (name, value) = (context.text(name)?, context.value(field)?);
        if record.images.len() == found {
            record.values.insert(name, value);
        }
    }
    Ok(record)
}

/// What is needed to turn a field into a value while images are set aside.
struct Context<'a> {
    origin: &'a str,
    folder: &'a ImageFolder,
    images: &'a mut Vec<ImageSource>,
    /// Bytes of text that the file may still unpack to.
    text_left: &'a mut u64,
}

impl Context<'_> {
    fn value(&mut self, field: Field) -> Result<Value> {
        Ok(match field {
            Field::Bool(v) => v.into(),
            Field::Byte(v) => v.into(),
            Field::Short(v) => v.into(),
            Field::Int(v) => v.into(),
            Field::Long(v) => v.into(),
            Field::UByte(v) => v.into(),
            Field::UShort(v) => v.into(),
            Field::UInt(v) => v.into(),
            Field::ULong(v) => v.into(),
            Field::Float(v) => f64::from(v).into(),
            Field::Double(v) => v.into(),
            Field::Str(v) => self.text(v)?.into(),
            Field::Bytes(v) => {
                self.images.push(ImageSource::Bytes {
                    name: format!("{}: image", self.origin),
                    bytes: v.data().into(),
                });
                Value::Null
            }
            Field::Group(row) => self.group(row)?,
            Field::ListInternal(list) => {
                let items = list.elements().iter().cloned();
                Value::Array(items.map(|f| self.value(f)).collect::<Result<_>>()?)
            }
            _ => Value::Null,
        })
    }

    /// Counts a text, or a column's name, which each row has anew.
    fn text(&mut self, text: String) -> Result<String> {
        match self.text_left.checked_sub(text.len() as u64) {
            Some(left) => *self.text_left = left,
            None => {
                let why = "far more text than the size of the file allows for";
                return Err(Error::format(Path::new(self.origin), "text", why));
            }
        }
        Ok(text)
    }

    /// A struct; one that holds image bytes, or only their path, is an image.
    fn group(&mut self, row: Row) -> Result<Value> {
        let columns = row.into_columns();
        let is_image = columns.iter().any(|(name, _)| name == "bytes");
        let found = self.images.len();
        let mut values = Map::new();
        for (name, field) in columns {
            values.insert(self.text(name)?, self.value(field)?);
        }
        let path = values.get("path").and_then(Value::as_str);
        if let (true, true, Some(path)) = (is_image, self.images.len() == found, path) {
            self.images.push(self.folder.resolve(self.origin, path)?);
        }
        Ok(Value::Object(values))
    }
}
