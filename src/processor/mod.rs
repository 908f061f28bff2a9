//! From images and messages to what the model reads, exactly as transformers does it.
//!
//! [`decode_image`] and [`mod@resize`] serve every family; an [`ImageProcessor`] holds what belongs
//! to some of them; [`chat`] renders templates. [`Processor`] joins them for one checkpoint folder.
//!
//! Compared bit by bit with transformers 5.23 and Pillow 13 in `testdata/processor`, whose script
//! is `tests/oracle/processor_golden.py`.

pub mod anyres;
pub mod chat;
pub mod gemma3;
pub mod idefics3;
pub mod image;
pub mod internvl;
pub mod llava;
pub mod paligemma;
pub mod pixtral;
pub mod qwen2_vl;
pub mod resize;
pub mod settings;
mod text;
pub mod tiles;

pub use self::chat::{ContentPart, Message, Role};
pub use self::image::{RgbImage, decode_image};
pub use self::resize::{Filter, resize};

use self::chat::{ChatTemplate, Rendered, TextSpan};
pub use self::settings::ImageSettings;
pub use self::text::MAX_TEXT_TOKENS;

use crate::{Error, Matrix, Result};
use serde::de::IgnoredAny;
use serde_json::{Map, Value};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokenizers::{Encoding, Tokenizer};

/// Largest tokenizer, template or settings file that is read.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// What a token of the input is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenClass {
    /// An image placeholder, whose embedding the vision tower gives.
    Vision,
    /// Text of a system or user message.
    Prompt,
    /// Text of an assistant message, and the end token right after it, since the model must
    /// predict that too.
    Answer,
    /// What the template itself writes (role names, line breaks, `<|im_start|>`, a default system
    /// message, the marks around an image), and white space at the edge of a text; what the
    /// tokenizer puts around raw text.
    Special,
    /// Raw text, which no template is put around.
    Text,
}

impl TokenClass {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 5] = [
        Self::Vision,
        Self::Prompt,
        Self::Answer,
        Self::Special,
        Self::Text,
    ];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vision => "vision",
            Self::Prompt => "prompt",
            Self::Answer => "answer",
            Self::Special => "special",
            Self::Text => "text",
        }
    }
}

/// One image as a vision tower takes it.
#[derive(Clone, Debug, PartialEq)]
pub struct VisionInput {
    /// `[n_patches, values of one]`, in the order of the tower.
    pub patches: Matrix,
    /// Patches in time (or tiles), height and width.
    pub grid_thw: [usize; 3],
    /// Tokens that the image takes in the prompt.
    pub n_tokens: usize,
    /// How the tiles make up the image, where it is cut into any.
    pub tiling: Option<Tiling>,
}

/// How an image was cut into tiles of equal size; a whole view of it may come before or after them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    /// Tiles below each other.
    pub rows: usize,
    /// Tiles beside each other.
    pub cols: usize,
    /// Rows of pixels of the image as it came.
    pub height: usize,
    /// Columns of pixels of the image as it came.
    pub width: usize,
}

/// What is a family's own about images.
pub trait ImageProcessor: std::fmt::Debug + Send + Sync {
    /// The image as the tower takes it, bit-identical to transformers' pixel values, in a
    /// conversation with `n_images` in all: some families cut a single image only.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the image is empty or has a shape that the family does not take.
    fn vision_input(&self, image: &RgbImage, n_images: usize) -> Result<VisionInput>;

    /// What the chat template writes for an image.
    fn placeholder(&self) -> &str;

    /// The token that stands for one row of the tower's output.
    fn image_token(&self) -> &str;

    /// The chat template of a family whose folders have none. It writes all of the input: nothing
    /// that the tokenizer puts around a text is added to it.
    fn template(&self) -> Option<&str> {
        None
    }

    /// Whether the tower sees all of an image and nothing around it, so that its patches, tiles aside,
    /// share the image out evenly.
    fn shows_whole_image(&self) -> bool {
        true
    }

    /// What the placeholder of an image becomes.
    fn prompt_text(&self, image: &VisionInput) -> String {
        self.image_token().repeat(image.n_tokens)
    }
}

/// One input ready for the model.
#[derive(Clone, Debug)]
pub struct ModelInput {
    /// Token ids, image placeholders replaced by the tokens of the images.
    pub input_ids: Vec<u32>,
    /// One class per token. A token that spans a text and the template counts as text.
    pub classes: Vec<TokenClass>,
    /// The images in the order of their placeholders.
    pub images: Vec<Arc<VisionInput>>,
}

/// Tokenizer, chat template and image settings of one checkpoint.
#[derive(Debug)]
pub struct Processor {
    dir: PathBuf,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    images: Box<dyn ImageProcessor>,
    image_token_id: u32,
    bos_token: Option<String>,
    eos_ids: Vec<u32>,
}

impl Processor {
    /// Reads `tokenizer.json`, `tokenizer_config.json`, the chat template, the image settings and
    /// the end tokens of a checkpoint folder; `images` makes a family's image processor of the
    /// settings.
    ///
    /// The template is `chat_template.jinja`, else `chat_template.json`, else the one in
    /// `tokenizer_config.json`, else the family's. Image settings are `image_processor` of
    /// `processor_config.json`, else `preprocessor_config.json`. End tokens are those of
    /// `generation_config.json`, else the tokenizer's.
    ///
    /// # Errors
    /// [`Error::Missing`] for an absent file, template or token, [`Error::Format`] for a damaged
    /// one, [`Error::Unsupported`] for an image processor of another family.
    pub fn open(
        model_dir: &Path,
        images: fn(&ImageSettings) -> Result<Box<dyn ImageProcessor>>,
    ) -> Result<Self> {
        let config = read_json(&model_dir.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
        let tokenizer = open_tokenizer(&model_dir.join("tokenizer.json"))?;
        let images = images(&ImageSettings::open(model_dir, &config)?)?;
        let template = open_template(model_dir, &config, images.template())?;
        let image_token_id = token_id(&tokenizer, images.image_token(), model_dir)?;
        let eos_ids = open_eos_ids(model_dir, &config, &tokenizer)?;
        Ok(Self {
            dir: model_dir.to_path_buf(),
            tokenizer,
            template,
            images,
            image_token_id,
            bos_token: token_text(&config["bos_token"]),
            eos_ids,
        })
    }

    /// An image as the tower takes it, in a conversation with `n_images` in all.
    ///
    /// # Errors
    /// As [`ImageProcessor::vision_input`].
    pub fn vision_input(&self, image: &RgbImage, n_images: usize) -> Result<VisionInput> {
        self.images.vision_input(image, n_images)
    }

    /// The text of `messages` with one placeholder per image.
    ///
    /// # Errors
    /// [`Error::Format`] if the chat template fails.
    pub fn render_chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.template.render(messages, add_generation_prompt)
    }

    /// The input that asks for an answer to `messages`; `images` in the order of their places.
    ///
    /// # Errors
    /// [`Error::Invalid`] if places and images differ in number, or a text holds the image
    /// placeholder; else as [`Processor::render_chat`].
    pub fn encode_prompt(
        &self,
        messages: &[Message],
        images: &[Arc<VisionInput>],
    ) -> Result<ModelInput> {
        self.encode(messages, images, true)
    }

    /// The input of a whole conversation, answers included.
    ///
    /// # Errors
    /// As [`Processor::encode_prompt`].
    pub fn encode_conversation(
        &self,
        messages: &[Message],
        images: &[Arc<VisionInput>],
    ) -> Result<ModelInput> {
        self.encode(messages, images, false)
    }

    /// The text of `ids` without special tokens.
    ///
    /// # Errors
    /// [`Error::Format`] if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        caught(|| self.tokenizer.decode(ids, true)).map_err(|e| self.tokenizer_error(&e))
    }

    /// What each of the tokens at these places says, special tokens included; a character that is
    /// split over tokens is none in any of them.
    ///
    /// # Errors
    /// [`Error::Format`] if the tokenizer's decoder fails.
    pub fn token_texts(&self, ids: &[u32], places: Range<usize>) -> Result<Vec<String>> {
        let decoded = |ids: &[u32]| {
            caught(|| self.tokenizer.decode(ids, false)).map_err(|e| self.tokenizer_error(&e))
        };
        let one = |i: usize| {
            // Some tokenizers leave out the blank before the first token of a text.
            let start = i.saturating_sub(1);
            let (before, both) = (decoded(&ids[start..i])?, decoded(&ids[start..=i])?);
            match both.strip_prefix(&before) {
                Some(text) => Ok(text.to_owned()),
                None => decoded(&ids[i..=i]),
            }
        };
        places.map(one).collect()
    }

    /// As [`ImageProcessor::shows_whole_image`].
    pub fn shows_whole_image(&self) -> bool {
        self.images.shows_whole_image()
    }

    /// The ids that end an answer.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The id of the image placeholder.
    pub fn image_token_id(&self) -> u32 {
        self.image_token_id
    }

    /// The token ids of `text`, special tokens in it recognised, as transformers' tokenizer gives.
    ///
    /// # Errors
    /// [`Error::Format`] if the tokenizer fails.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenized(text, true)?.get_ids().to_vec())
    }

    /// As [`Processor::encode_text`], of text that goes on after other text: without what the
    /// tokenizer puts around a whole one.
    ///
    /// # Errors
    /// [`Error::Format`] if the tokenizer fails.
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenized(text, false)?.get_ids().to_vec())
    }

    fn tokenized(&self, text: &str, add_special_tokens: bool) -> Result<Encoding> {
        let encoding = caught(|| self.tokenizer.encode(text, add_special_tokens));
        encoding.map_err(|e| self.tokenizer_error(&e))
    }

    fn tokenizer_error(&self, error: &tokenizers::Error) -> Error {
        Error::format(
            &self.dir.join("tokenizer.json"),
            "tokenizer",
            error.to_string(),
        )
    }

    fn encode(
        &self,
        messages: &[Message],
        images: &[Arc<VisionInput>],
        add_generation_prompt: bool,
    ) -> Result<ModelInput> {
        let places: usize = messages.iter().map(Message::n_images).sum();
        let rendered = self
            .template
            .render_spans(messages, add_generation_prompt)?;
        let placeholder = self.images.placeholder();
        let found = rendered.text.matches(placeholder).count();
        if places != images.len() || found != places {
            return Err(Error::Invalid {
                what: "images of a conversation".into(),
                why: format!(
                    "{} given, {places} places in the messages, {found} {placeholder} in the rendered \
                     text; all three must agree",
                    images.len(),
                ),
            });
        }
        let texts = images.iter().map(|image| self.images.prompt_text(image));
        let expanded = expand_images(&rendered, placeholder, &texts.collect::<Vec<_>>());
        // A template that begins with the first token itself would else give two of them.
        let begins = |bos: &String| expanded.text.starts_with(bos.as_str());
        let has_bos = self.bos_token.as_ref().is_some_and(begins);
        let is_whole = has_bos || self.images.template().is_some();
        let encoding = self.tokenized(&expanded.text, !is_whole)?;
        let input_ids = encoding.get_ids().to_vec();
        let classes = self.classes(&input_ids, encoding.get_offsets(), &expanded.spans);
        let n_vision: usize = images.iter().map(|image| image.n_tokens).sum();
        let n_found = input_ids
            .iter()
            .filter(|id| **id == self.image_token_id)
            .count();
        if n_vision != n_found {
            return Err(Error::format(
                &self.dir.join("tokenizer.json"),
                self.images.image_token(),
                format!("{n_vision} image tokens expected in the input, {n_found} found"),
            ));
        }
        Ok(ModelInput {
            input_ids,
            classes,
            images: images.to_vec(),
        })
    }

    /// Spans are in order and disjoint, tokens in order: one walk along both.
    fn classes(
        &self,
        ids: &[u32],
        offsets: &[(usize, usize)],
        spans: &[TextSpan],
    ) -> Vec<TokenClass> {
        let mut classes = Vec::with_capacity(ids.len());
        let mut next = 0;
        for (id, &(start, end)) in ids.iter().zip(offsets) {
            while spans.get(next).is_some_and(|s| s.bytes.end <= start) {
                next += 1;
            }
            // A later byte of a character split over tokens may carry an empty range.
            let reach = end.max(start + 1);
            let span = spans.get(next).filter(|s| s.bytes.start < reach);
            let after_answer = classes.last() == Some(&TokenClass::Answer);
            classes.push(match span {
                _ if *id == self.image_token_id => TokenClass::Vision,
                Some(span) if span.role == Role::Assistant => TokenClass::Answer,
                Some(_) => TokenClass::Prompt,
                None if after_answer
                    && self.eos_ids.contains(id)
                    && !ends_answer(&classes, ids, &self.eos_ids) =>
                {
                    TokenClass::Answer
                }
                None => TokenClass::Special,
            });
        }
        classes
    }
}

/// Whether the last classified token is itself an end token, so that only one is counted.
fn ends_answer(classes: &[TokenClass], ids: &[u32], eos_ids: &[u32]) -> bool {
    let last = classes.len().checked_sub(1).and_then(|i| ids.get(i));
    last.is_some_and(|id| eos_ids.contains(id))
}

/// Puts `texts[i]` in place of the i-th placeholder and moves the spans along.
fn expand_images(rendered: &Rendered, placeholder: &str, texts: &[String]) -> Rendered {
    let mut text = String::with_capacity(rendered.text.len());
    let mut moves: Vec<Move> = Vec::with_capacity(texts.len());
    let mut copied = 0;
    for ((at, _), own) in rendered.text.match_indices(placeholder).zip(texts) {
        text.push_str(&rendered.text[copied..at]);
        text.push_str(own);
        copied = at + placeholder.len();
        moves.push(Move {
            from: copied,
            to: text.len(),
        });
    }
    text.push_str(&rendered.text[copied..]);
    let moved = |at: usize| {
        let last = moves.partition_point(|m| m.from <= at);
        match last.checked_sub(1).map(|i| &moves[i]) {
            Some(m) => at - m.from + m.to,
            None => at,
        }
    };
    let spans = rendered.spans.iter().map(|span| TextSpan {
        bytes: Range {
            start: moved(span.bytes.start),
            end: moved(span.bytes.end),
        },
        role: span.role,
    });
    Rendered {
        spans: spans.collect(),
        text,
    }
}

/// Text from byte `from` on starts at byte `to` after expansion.
struct Move {
    from: usize,
    to: usize,
}

fn read_file(path: &Path) -> Result<Option<Vec<u8>>> {
    let found = match std::fs::metadata(path) {
        Ok(found) => found,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path, "read", e)),
    };
    if found.len() > MAX_FILE_BYTES {
        let why = format!("{} bytes, at most {MAX_FILE_BYTES} expected", found.len());
        return Err(Error::format(path, "file size", why));
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, "read", e))?;
    Ok(Some(bytes))
}

pub(crate) fn read_json(path: &Path) -> Result<Option<Value>> {
    let Some(bytes) = read_file(path)? else {
        return Ok(None);
    };
    let value: Value =
        serde_json::from_slice(&bytes).map_err(|e| Error::format(path, "JSON", e.to_string()))?;
    if !value.is_object() {
        return Err(Error::format(path, "top level", "a JSON object expected"));
    }
    Ok(Some(value))
}

fn missing(what: &str, dir: &Path) -> Error {
    Error::Missing {
        what: what.to_owned(),
        place: dir.display().to_string(),
    }
}

/// The tokenizers crate asserts some properties of a file that a damaged one lacks.
fn caught<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err("damaged tokenizer".into()))
}

fn open_tokenizer(path: &Path) -> Result<Tokenizer> {
    let dir = path.parent().unwrap_or(path);
    let bytes = read_file(path)?.ok_or_else(|| missing("tokenizer.json", dir))?;
    let bad = |e: tokenizers::Error| Error::format(path, "tokenizer", e.to_string());
    // The tokenizers crate does not expect that its JSON breaks off.
    serde_json::from_slice::<IgnoredAny>(&bytes)
        .map_err(|e| Error::format(path, "JSON", e.to_string()))?;
    let mut tokenizer = caught(|| Tokenizer::from_bytes(bytes)).map_err(bad)?;
    tokenizer.with_truncation(None).map_err(bad)?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// A token as plain text or as an object with its `content`.
fn token_text(value: &Value) -> Option<String> {
    let text = value.as_str().or_else(|| value["content"].as_str());
    text.map(str::to_owned)
}

fn token_id(tokenizer: &Tokenizer, token: &str, dir: &Path) -> Result<u32> {
    let id = tokenizer.token_to_id(token);
    id.ok_or_else(|| missing(&format!("token {token}"), &dir.join("tokenizer.json")))
}

fn open_template(
    dir: &Path,
    tokenizer_config: &Value,
    of_family: Option<&str>,
) -> Result<ChatTemplate> {
    let mut special_tokens = Map::new();
    for name in [
        "bos_token",
        "eos_token",
        "unk_token",
        "sep_token",
        "pad_token",
    ] {
        if let Some(token) = token_text(&tokenizer_config[name]) {
            special_tokens.insert(name.to_owned(), token.into());
        }
    }
    let jinja = dir.join("chat_template.jinja");
    if let Some(bytes) = read_file(&jinja)? {
        let text = String::from_utf8(bytes)
            .map_err(|e| Error::format(&jinja, "text", format!("no UTF-8: {e}")))?;
        return ChatTemplate::new(&jinja.display().to_string(), &text, special_tokens);
    }
    let legacy = dir.join("chat_template.json");
    let (path, value) = match read_json(&legacy)? {
        Some(value) => (legacy, value["chat_template"].clone()),
        None => (
            dir.join("tokenizer_config.json"),
            tokenizer_config["chat_template"].clone(),
        ),
    };
    let text = default_template(&value).or(of_family).ok_or_else(|| {
        missing(
            "chat template (chat_template.jinja or the key chat_template)",
            dir,
        )
    })?;
    ChatTemplate::new(&path.display().to_string(), text, special_tokens)
}

/// A template is a text, or a list of named ones of which `default` is meant.
fn default_template(value: &Value) -> Option<&str> {
    let named = value.as_array().into_iter().flatten();
    let default = named.into_iter().find(|t| t["name"] == "default");
    value
        .as_str()
        .or_else(|| default.and_then(|t| t["template"].as_str()))
}

fn open_eos_ids(dir: &Path, tokenizer_config: &Value, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let path = dir.join("generation_config.json");
    let value = read_json(&path)?.map_or(Value::Null, |mut v| v["eos_token_id"].take());
    let as_id = |v: &Value| {
        let id = v.as_u64().and_then(|n| u32::try_from(n).ok());
        id.ok_or_else(|| Error::format(&path, "eos_token_id", format!("an id expected, {v} found")))
    };
    match &value {
        Value::Null => {}
        Value::Array(list) if list.is_empty() => {}
        Value::Array(list) => return list.iter().map(as_id).collect(),
        one => return Ok(vec![as_id(one)?]),
    }
    let token = token_text(&tokenizer_config["eos_token"])
        .ok_or_else(|| missing("eos_token_id or eos_token", dir))?;
    Ok(vec![token_id(tokenizer, &token, dir)?])
}

#[cfg(test)]
mod tests;
