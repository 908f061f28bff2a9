//! Samples and questions from the files that people have: one set of readers for calibration and
//! for evaluation.
//!
//! DATA is any of
//! - JSONL (or a JSON array) whose rows hold `conversations` (LLaVA, ShareGPT4V), `messages` (chat
//!   messages with image parts) or `question` and `answer`;
//! - a Hugging Face parquet file with such columns, images as `{bytes, path}`;
//! - a VLMEvalKit TSV, images as base64;
//! - a folder: `samples.jsonl` in it, else all its parquet files in order of name.
//!
//! Image names are resolved in the data file's folder, then as members of an `images.zip` beside
//! it, read without unpacking. Data is not trusted: absolute names, `..` and web addresses are
//! refused. Images are read when a sample is used; the rows themselves, and with parquet and TSV
//! the encoded images, are held in memory.

pub mod image_source;
mod jsonl;
mod parquet;
mod parquet_layout;
mod record;
mod tsv;

pub use self::image_source::ImageSource;

use self::image_source::ImageFolder;
use self::record::Record;
use crate::processor::Message;
use crate::{Error, Result};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// One conversation with its images.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The row's own id, else its place in the file.
    pub id: String,
    /// File and line or row, for messages.
    pub origin: String,
    /// The turns, answers included.
    pub messages: Vec<Message>,
    /// The images in the order of their places in the messages.
    pub images: Vec<ImageSource>,
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
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut order: Vec<usize> = (0..self.len()).collect();
        for i in 0..n {
            let rest = (self.len() - i) as u64;
            order.swap(i, i + rng.random_range(0..rest) as usize);
        }
        let mut chosen = order[..n].to_vec();
        chosen.sort_unstable();
        Ok(chosen.into_iter().map(|i| &self.samples[i]).collect())
    }
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

/// The questions of DATA in file order; a conversation counts by its first turn and answer.
///
/// # Errors
/// As [`open_samples`].
pub fn open_questions(path: &Path) -> Result<Vec<Question>> {
    let records = open_records(path)?;
    records.into_iter().map(Record::into_question).collect()
}

fn open_records(path: &Path) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for file in data_files(path)? {
        let parent = file.parent().unwrap_or(Path::new("")).to_path_buf();
        let folder = Arc::new(ImageFolder::open(&parent)?);
        records.extend(match extension(&file).as_str() {
            "jsonl" | "json" => jsonl::read(&file, &folder)?,
            "parquet" => parquet::read(&file, &folder)?,
            "tsv" => tsv::read(&file)?,
            other => {
                return Err(Error::Unsupported {
                    what: format!(
                        "{}: data of kind {other:?}; supported are .jsonl, .json, .parquet, .tsv \
                         and folders of them",
                        file.display()
                    ),
                });
            }
        });
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
        return Err(Error::Missing {
            what: "samples.jsonl or a parquet file".into(),
            place: path.display().to_string(),
        });
    }
    Ok(files)
}

#[cfg(test)]
mod tests;
