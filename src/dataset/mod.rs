//! Samples and questions from the files that people have: one set of readers for calibration and
//! for evaluation.
//!
//! DATA is any of
//! - JSONL (or a JSON array) whose rows hold `conversations` (LLaVA, ShareGPT4V), `messages` (chat
//!   messages with image parts), `question` and `answer`, or nothing of these but `text`: raw text,
//!   which no chat template is put around. Rows of different kinds may stand in one file;
//! - a Hugging Face parquet file with such columns, images as `{bytes, path}`;
//! - a VLMEvalKit TSV, images as base64;
//! - ChartQA's own JSON files, with their images in a folder `png`;
//! - a folder: `samples.jsonl` in it, else all its parquet files in order of name, else ChartQA's files.
//!
//! Image names are resolved in the data file's folder, then as members of an `images.zip` beside
//! it, read without unpacking. Data is not trusted: absolute names, `..` and web addresses are
//! refused. Images are read when a sample is used. [`read_rows`] reads row by row; what opens a whole
//! set holds the rows, and with parquet and TSV the encoded images, in memory.

mod chartqa;
pub mod image_source;
pub(crate) mod jsonl;
mod parquet;
mod parquet_layout;
mod record;
mod tsv;

pub use self::image_source::ImageSource;
pub(crate) use self::record::text_of;

use self::image_source::ImageFolder;
use self::record::{Record, Records};
use crate::processor::Message;
use crate::{Error, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One conversation or one text.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The row's own id, else its place in the file.
    pub id: String,
    /// File and line or row, for messages.
    pub origin: String,
    /// What it says.
    pub content: Content,
}

/// What a sample says.
#[derive(Clone, Debug)]
pub enum Content {
    /// A conversation, with or without images.
    Chat {
        /// The turns, answers included.
        messages: Vec<Message>,
        /// The images in the order of their places in the messages.
        images: Vec<ImageSource>,
    },
    /// Raw text, never empty.
    Text(String),
}

impl Sample {
    /// The turns of a conversation; none of raw text.
    pub fn messages(&self) -> &[Message] {
        match &self.content {
            Content::Chat { messages, .. } => messages,
            Content::Text(_) => &[],
        }
    }

    /// The images of a conversation.
    pub fn images(&self) -> &[ImageSource] {
        match &self.content {
            Content::Chat { images, .. } => images,
            Content::Text(_) => &[],
        }
    }
}

/// One question of an evaluation set.
#[derive(Clone, Debug)]
pub struct Question {
    /// The row's own id, else its place in the file.
    pub id: String,
    /// File and line or row, for messages.
    pub origin: String,
    /// The images, which stand before the question.
    pub images: Vec<ImageSource>,
    /// The text of the question; with multiple choice, hint and options included.
    pub question: String,
    /// Answers that count as right; empty if the set has none.
    pub answers: Vec<String>,
    /// What kind of question it is, where the set says so.
    pub category: Option<String>,
}

/// Raw text of an evaluation set.
#[derive(Clone, Debug)]
pub struct Text {
    /// The row's own id, else its place in the file.
    pub id: String,
    /// File and line or row, for messages.
    pub origin: String,
    /// The text, never empty.
    pub text: String,
}

/// The rows of an evaluation set.
#[derive(Clone, Debug)]
pub enum Rows {
    /// Questions to be answered.
    Questions(Vec<Question>),
    /// Texts to be predicted.
    Texts(Vec<Text>),
}

/// All samples of one DATA argument, in file order; never empty.
#[derive(Clone, Debug)]
pub struct SampleSet {
    path: PathBuf,
    samples: Vec<Sample>,
}

impl SampleSet {
    /// Number of samples.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Never true: an empty set is an error when it is opened.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// The samples in file order.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }

    /// `n` different samples in file order, the same ones for the same seed on every machine.
    /// With one seed, a smaller choice is part of a larger one.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `n` is zero or more than there are.
    pub fn choose(&self, n: usize, seed: u64) -> Result<Vec<&Sample>> {
        if n == 0 || n > self.len() {
            return Err(Error::Invalid {
                what: format!("--samples {n}"),
                why: format!(
                    "{} has 1 to {} to choose from",
                    self.path.display(),
                    self.len()
                ),
            });
        }
        let chosen = chosen_rows(self.len(), n, seed);
        Ok(chosen.into_iter().map(|i| &self.samples[i]).collect())
    }
}

/// Which rows [`SampleSet::choose`] takes of a set of `len`; all of them if `n` is not less.
pub fn chosen_rows(len: usize, n: usize, seed: u64) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..len).collect();
    let n = n.min(len);
    for i in 0..n {
        let rest = (len - i) as u64;
        order.swap(i, i + rng.random_range(0..rest) as usize);
    }
    order.truncate(n);
    order.sort_unstable();
    order
}

/// The samples of DATA.
///
/// # Errors
/// [`Error::Io`] for an unreadable file, [`Error::Format`] naming file and row for a damaged or
/// inconsistent one (an image without its place, a place without its image), [`Error::Invalid`]
/// for an image name that leaves the folder, [`Error::Missing`] for an empty set or an image that
/// is not there, [`Error::Unsupported`] for another kind of file.
pub fn open_samples(path: &Path) -> Result<SampleSet> {
    let samples = open_records(path)?.into_iter().map(Record::into_sample);
    Ok(SampleSet {
        path: path.to_path_buf(),
        samples: samples.collect::<Result<_>>()?,
    })
}

/// The questions of DATA in file order, where a conversation counts by its first turn and answer;
/// or its texts.
///
/// # Errors
/// As [`open_samples`]; [`Error::Format`] naming the first row that is of the other kind.
pub fn open_rows(path: &Path) -> Result<Rows> {
    let records = open_records(path)?;
    let is_text = records.first().is_some_and(Record::is_text);
    if let Some(other) = records.iter().find(|record| record.is_text() != is_text) {
        return Err(other.bad("raw text and questions in one file; a task is of one kind"));
    }
    let records = records.into_iter();
    Ok(match is_text {
        true => Rows::Texts(records.map(Record::into_text).collect::<Result<_>>()?),
        false => Rows::Questions(records.map(Record::into_question).collect::<Result<_>>()?),
    })
}

/// The questions of DATA, which holds nothing else.
///
/// # Errors
/// As [`open_rows`]; [`Error::Missing`] if DATA holds raw texts.
pub fn open_questions(path: &Path) -> Result<Vec<Question>> {
    match open_rows(path)? {
        Rows::Questions(questions) => Ok(questions),
        Rows::Texts(_) => Err(Error::Missing {
            what: "questions (it holds raw texts)".into(),
            place: path.display().to_string(),
        }),
    }
}

/// A row as it stands in its file.
#[derive(Debug)]
pub struct Row {
    record: Record,
    is_of_table: bool,
}

impl Row {
    /// The row's own id, else its place in the file.
    pub fn id(&self) -> String {
        self.record.id()
    }

    /// File and line or row, for messages.
    pub fn origin(&self) -> String {
        self.record.origin()
    }

    /// Whether all values are texts because it is a row of a TSV.
    pub fn is_of_table(&self) -> bool {
        self.is_of_table
    }

    /// Everything but images by name of column.
    pub fn values(&self) -> &Map<String, Value> {
        &self.record.values
    }

    /// The values, images as text left out.
    pub fn into_values(self) -> Map<String, Value> {
        let mut values = self.record.values;
        values.retain(|key, _| key != record::BASE64_KEY);
        values
    }

    /// The row's images.
    ///
    /// # Errors
    /// As [`open_samples`] for one that cannot be had.
    pub fn images(&self) -> Result<Vec<ImageSource>> {
        self.record.row_images()
    }

    /// Whether it is raw text.
    pub fn is_text(&self) -> bool {
        self.record.is_text()
    }

    /// The row as a question of its own.
    ///
    /// # Errors
    /// As [`open_rows`].
    pub fn into_question(self) -> Result<Question> {
        if self.is_text() {
            let why = "raw text and questions in one file; a task is of one kind";
            return Err(self.record.bad(why));
        }
        self.record.into_question()
    }
}

/// The rows of DATA, read as they are asked for: what is in memory is a row group of parquet or a line,
/// and the images of the rows that the caller keeps. Nothing follows an error.
///
/// # Errors
/// As [`open_samples`], of the first file at once and of the others when they are reached.
pub fn read_rows(path: &Path) -> Result<impl Iterator<Item = Result<Row>> + Send> {
    let mut files = data_files(path)?.into_iter();
    let first = files.next().map(|file| records_of(&file)).transpose()?;
    let rest = files.flat_map(|file| match records_of(&file) {
        Ok(records) => records,
        Err(e) => Box::new(std::iter::once(Err(e))),
    });
    let mut is_sound = true;
    let rows = first.into_iter().flatten().chain(rest);
    Ok(rows
        .take_while(move |row| std::mem::replace(&mut is_sound, row.is_ok()))
        .map(|record| {
            let record = record?;
            let is_of_table = extension(&record.path) == "tsv";
            Ok(Row {
                record,
                is_of_table,
            })
        }))
}

fn records_of(file: &Path) -> Result<Records> {
    let parent = file.parent().unwrap_or(Path::new("")).to_path_buf();
    let folder = Arc::new(ImageFolder::open(&parent)?);
    match extension(file).as_str() {
        "jsonl" | "json" => jsonl::read(file, &folder),
        "parquet" => parquet::read(file, &folder),
        "tsv" => tsv::read(file),
        other => Err(Error::Unsupported {
            what: format!(
                "{}: data of kind {other:?}; supported are .jsonl, .json, .parquet, .tsv and \
                 folders of them",
                file.display()
            ),
        }),
    }
}

fn open_records(path: &Path) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for file in data_files(path)? {
        for record in records_of(&file)? {
            records.push(record?);
        }
    }
    if records.is_empty() {
        return Err(Error::Missing {
            what: "samples (the set is empty)".into(),
            place: path.display().to_string(),
        });
    }
    Ok(records)
}

fn extension(path: &Path) -> String {
    let extension = path.extension().unwrap_or_default();
    extension.to_string_lossy().to_ascii_lowercase()
}

fn data_files(path: &Path) -> Result<Vec<PathBuf>> {
    let found = std::fs::metadata(path).map_err(|e| Error::io(path, "read", e))?;
    if !found.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let samples = path.join("samples.jsonl");
    if samples.is_file() {
        return Ok(vec![samples]);
    }
    let mut files = Vec::new();
    let unlisted = |e| Error::io(path, "list", e);
    for entry in std::fs::read_dir(path).map_err(unlisted)? {
        let file = entry.map_err(unlisted)?.path();
        if extension(&file) == "parquet" && file.is_file() {
            files.push(file);
        }
    }
    files.sort();
    if files.is_empty() {
        files = chartqa::files(path);
    }
    if files.is_empty() {
        return Err(Error::Missing {
            what: "samples.jsonl or a parquet file".into(),
            place: path.display().to_string(),
        });
    }
    Ok(files)
}

#[cfg(test)]
mod tests;
