//! Questions and texts ready for the model.

use crate::dataset::{Question, Rows, open_rows};
use crate::eval::MAX_ANSWER_TOKENS;
use crate::eval::benchmark::Asked;
use crate::eval::first_token::{LetterToken, letter_tokens};
use crate::eval::text::TextItem;
use crate::model::LoadedModel;
use crate::model::loaded::Prefix;
use crate::model::vision::ImageFeatures;
use crate::processor::chat::{ContentPart, Message, Role};
use crate::processor::{ModelInput, Processor, VisionInput};
use crate::{Error, Result};
use rayon::prelude::*;
use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

/// The encoded rows of one file.
pub struct Task {
    /// File name without its ending.
    pub name: String,
    /// Rows in file order.
    pub items: TaskItems,
}

/// What a file asks of a model.
pub enum TaskItems {
    /// To answer questions.
    Questions(Vec<EvalItem>),
    /// To predict texts.
    Texts(Vec<TextItem>),
}

impl TaskItems {
    /// Number of questions or texts.
    pub fn len(&self) -> usize {
        match self {
            Self::Questions(items) => items.len(),
            Self::Texts(items) => items.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One question.
pub struct EvalItem {
    /// Id in the file.
    pub id: String,
    /// File and row, for messages.
    pub origin: String,
    /// What kind of question it is, where the file says so.
    pub category: Option<String>,
    /// Right answers.
    pub answers: Vec<String>,
    /// The prompt up to the place of the answer.
    pub prompt: ModelInput,
    /// The prompt with the first right answer after it, end token included, and how many tokens
    /// of it are the prompt.
    pub answered: Option<(ModelInput, usize)>,
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
    /// Of multiple choice, the letters to choose from.
    pub letters: Vec<LetterToken>,
    images: Vec<Arc<EvalImage>>,
}

/// An image that several questions may share. The tower is never quantized, so its features are
/// computed once for all models of a comparison that have the tower of the first; towers of turned
/// models are others.
struct EvalImage {
    input: Arc<VisionInput>,
    /// With the digest of the tower.
    features: OnceLock<(String, ImageFeatures)>,
}

/// The questions, those with the same images together as they stand in the file.
pub(super) fn groups(items: &[EvalItem]) -> Vec<&[EvalItem]> {
    let same = |a: &EvalItem, b: &EvalItem| {
        let pairs = a.images.iter().zip(&b.images);
        a.images.len() == b.images.len() && pairs.into_iter().all(|(a, b)| Arc::ptr_eq(a, b))
    };
    items.chunk_by(same).collect()
}

/// What the model has read of the tokens with which all prompts of a group begin.
///
/// # Errors
/// As [`LoadedModel::read_prefix`].
pub(super) fn shared_prefix(model: &LoadedModel, group: &[EvalItem]) -> Result<Prefix> {
    let Some((first, others)) = group.split_first().filter(|(_, others)| !others.is_empty()) else {
        return Ok(model.nothing());
    };
    let ids = &first.prompt.input_ids;
    let common = |item: &EvalItem| {
        let pairs = ids.iter().zip(&item.prompt.input_ids);
        pairs.take_while(|(a, b)| a == b).count()
    };
    // At least one token stays to be read, even where a prompt stands twice.
    let shortest = group
        .iter()
        .map(|item| item.prompt.input_ids.len())
        .min()
        .unwrap_or(1);
    let n = others
        .iter()
        .map(common)
        .min()
        .unwrap_or(0)
        .min(shortest - 1);
    model.read_prefix(&first.prompt, &first.features(model)?, n)
}

impl EvalItem {
    /// Features of the question's images.
    ///
    /// # Errors
    /// As [`LoadedModel::image_features`].
    pub fn features(&self, model: &LoadedModel) -> Result<Vec<ImageFeatures>> {
        let one = |image: &Arc<EvalImage>| {
            let kept = image.features.get();
            if let Some((_, features)) = kept.filter(|(tower, _)| tower == model.tower_digest()) {
                return Ok(features.clone());
            }
            let features = model.image_features(&image.input)?;
            let tower = || model.tower_digest().to_owned();
            image.features.get_or_init(|| (tower(), features.clone()));
            Ok(features)
        };
        self.images.iter().map(one).collect()
    }
}

/// Which rows of a task are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskRows {
    /// Rows left out before the first.
    pub skip: usize,
    /// At most so many; absent: all.
    pub limit: Option<usize>,
}

impl TaskRows {
    fn cut<T>(self, rows: &mut Vec<T>) {
        rows.drain(..self.skip.min(rows.len()));
        rows.truncate(self.limit.unwrap_or(usize::MAX));
    }
}

/// The tasks of a file, or of all files of a folder in order of name; of each those of
/// `rows`. Raw texts are read in pieces of at most `max_tokens`.
///
/// # Errors
/// The readers' and the processor's; [`Error::Missing`] for a folder without files of data;
/// [`Error::Invalid`] for a text in which no token is to be predicted.
pub fn open_tasks(
    path: &Path,
    processor: &Processor,
    rows: TaskRows,
    max_tokens: usize,
) -> Result<Vec<Task>> {
    let files = task_files(path)?;
    files
        .iter()
        .map(|file| open_task(file, processor, rows, max_tokens))
        .collect()
}

/// The file itself, or all files of data of a folder in order of name.
///
/// # Errors
/// [`Error::Io`]; [`Error::Missing`] for a folder without files of data.
pub fn task_files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let list = |e| Error::io(path, "list", e);
    let entries = std::fs::read_dir(path).map_err(list)?;
    let paths = entries.map(|entry| entry.map(|e| e.path()));
    let mut files: Vec<PathBuf> = paths.collect::<std::io::Result<_>>().map_err(list)?;
    let known = |f: &PathBuf| {
        f.extension()
            .is_some_and(|e| ["parquet", "jsonl", "tsv"].iter().any(|k| e == *k))
    };
    files.retain(known);
    files.sort();
    match files.is_empty() {
        true => Err(Error::Missing {
            what: "a .parquet, .jsonl or .tsv file".into(),
            place: path.display().to_string(),
        }),
        false => Ok(files),
    }
}

fn open_task(
    path: &Path,
    processor: &Processor,
    rows: TaskRows,
    max_tokens: usize,
) -> Result<Task> {
    let items = match open_rows(path)? {
        Rows::Questions(mut questions) => {
            rows.cut(&mut questions);
            let images = Mutex::new(HashMap::new());
            let items = questions
                .par_iter()
                .map(|q| encode(q, processor, &images, MAX_ANSWER_TOKENS));
            TaskItems::Questions(items.collect::<Result<_>>()?)
        }
        Rows::Texts(mut texts) => {
            rows.cut(&mut texts);
            let items = texts
                .par_iter()
                .map(|t| TextItem::new(t, processor, max_tokens));
            TaskItems::Texts(items.collect::<Result<_>>()?)
        }
    };
    let name = path
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    Ok(Task { name, items })
}

type ImageCache = Mutex<HashMap<u64, Arc<EvalImage>>>;

/// Questions of a benchmark, ready for the model.
///
/// # Errors
/// The processor's, and those of images that cannot be read.
pub fn encode_questions(asked: &[Asked], processor: &Processor) -> Result<Vec<EvalItem>> {
    let images = Mutex::new(HashMap::new());
    let one = |asked: &Asked| {
        let item = encode(&asked.question, processor, &images, asked.max_new_tokens)?;
        Ok(EvalItem {
            letters: letter_tokens(processor, &asked.letters)?,
            ..item
        })
    };
    asked.par_iter().map(one).collect()
}

fn encode(
    question: &Question,
    processor: &Processor,
    cache: &ImageCache,
    max_new_tokens: usize,
) -> Result<EvalItem> {
    let n_images = question.images.len();
    let images = question.images.iter().map(|source| {
        let mut hasher = DefaultHasher::new();
        let bytes = source.read()?;
        bytes.hash(&mut hasher);
        n_images.hash(&mut hasher);
        let key = hasher.finish();
        if let Some(known) = cache.lock().expect("no holder panics").get(&key) {
            return Ok(known.clone());
        }
        let input = Arc::new(processor.vision_input(&source.load()?, n_images)?);
        let image = Arc::new(EvalImage {
            input,
            features: OnceLock::new(),
        });
        let mut cache = cache.lock().expect("no holder panics");
        Ok(cache.entry(key).or_insert(image).clone())
    });
    let images = images.collect::<Result<Vec<_>>>()?;
    let inputs: Vec<Arc<VisionInput>> = images.iter().map(|i| i.input.clone()).collect();
    let parts = inputs.iter().map(|_| ContentPart::Image);
    let user = Message {
        role: Role::User,
        content: parts
            .chain([ContentPart::Text(question.question.clone())])
            .collect(),
    };
    let prompt = processor.encode_prompt(std::slice::from_ref(&user), &inputs)?;
    let answered = question
        .answers
        .first()
        .map(|answer| with_answer(processor, &prompt, answer));
    Ok(EvalItem {
        id: question.id.clone(),
        origin: question.origin.clone(),
        category: question.category.clone(),
        answers: question.answers.clone(),
        answered: answered.transpose()?,
        prompt,
        max_new_tokens,
        letters: Vec::new(),
        images,
    })
}

/// The prompt followed by an answer and the end token, as a model that gives it would have it.
fn with_answer(
    processor: &Processor,
    prompt: &ModelInput,
    answer: &str,
) -> Result<(ModelInput, usize)> {
    let mut input = prompt.clone();
    let answer = processor.encode_continuation(answer)?;
    let end = processor.eos_ids().first().copied();
    for id in answer.into_iter().chain(end) {
        input.input_ids.push(id);
        input.classes.push(crate::processor::TokenClass::Answer);
    }
    Ok((input, prompt.input_ids.len()))
}
