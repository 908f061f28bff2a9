//! From images and messages to what the model reads, exactly as transformers does it.
//!
//! [`decode_image`] and [`mod@resize`] serve every family; [`qwen2_vl`] holds what belongs to one
//! family, so that another family is another file; [`chat`] renders templates. [`Processor`] joins
//! them for one checkpoint folder.
//!
//! Compared bit by bit with transformers 5.23 and Pillow 13 in `testdata/processor`, whose script
//! is `tests/oracle/processor_golden.py`.

pub mod chat;
pub mod image;
pub mod qwen2_vl;
pub mod resize;

pub use self::chat::{ContentPart, Message, Role};
pub use self::image::{RgbImage, decode_image};
pub use self::qwen2_vl::VisionInput;
pub use self::resize::{Filter, resize};

use self::chat::{ChatTemplate, Rendered, TextSpan};
use self::qwen2_vl::Preprocessor;
use crate::{Error, Result};
use serde::de::IgnoredAny;
use serde_json::{Map, Value};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokenizers::Tokenizer;

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
    /// message, the marks around an image), and white space at the edge of a text.
    Special,
}

/// One input ready for the model.
#[derive(Clone, Debug)]
pub struct ModelInput {
    /// Token ids, image placeholders repeated once per merged patch.
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
    images: Preprocessor,
    image_token: String,
    image_token_id: u32,
    eos_ids: Vec<u32>,
}

impl Processor {
    /// Reads `tokenizer.json`, `tokenizer_config.json`, the chat template, the image settings and
    /// the end tokens of a checkpoint folder.
    ///
    /// The template is `chat_template.jinja`, else `chat_template.json`, else the one in
    /// `tokenizer_config.json`. Image settings are `image_processor` of `processor_config.json`,
    /// else `preprocessor_config.json`. End tokens are those of `generation_config.json`, else the
    /// tokenizer's.
    ///
    /// # Errors
    /// [`Error::Missing`] for an absent file, template or token, [`Error::Format`] for a damaged
    /// one, [`Error::Unsupported`] for an image processor of another family.
    pub fn open(model_dir: &Path) -> Result<Self> {
        let config = read_json(&model_dir.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
        let tokenizer = open_tokenizer(&model_dir.join("tokenizer.json"))?;
        let template = open_template(model_dir, &config)?;
        let images = open_images(model_dir)?;
        let image_token = match token_text(&config["image_token"]) {
            Some(token) => token,
            None => "<|image_pad|>".to_owned(),
        };
        let image_token_id = token_id(&tokenizer, &image_token, model_dir)?;
        let eos_ids = open_eos_ids(model_dir, &config, &tokenizer)?;
        Ok(Self {
            dir: model_dir.to_path_buf(),
            tokenizer,
            template,
            images,
            image_token,
            image_token_id,
            eos_ids,
        })
    }

    /// The patches of an image, bit-identical to transformers' `pixel_values`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the image is empty or too elongated.
    pub fn vision_input(&self, image: &RgbImage) -> Result<VisionInput> {
        self.images.vision_input(image)
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

    /// The ids that end an answer.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The id of the image placeholder.
    pub fn image_token_id(&self) -> u32 {
        self.image_token_id
    }

    /// Patches per side that are merged into one token.
    pub fn merge_size(&self) -> usize {
        self.images.merge_size()
    }

    /// The token ids of `text`, special tokens in it recognised, as transformers' tokenizer gives.
    ///
    /// # Errors
    /// [`Error::Format`] if the tokenizer fails.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = caught(|| self.tokenizer.encode(text, true));
        Ok(encoding
            .map_err(|e| self.tokenizer_error(&e))?
            .get_ids()
            .to_vec())
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
        let found = rendered.text.matches(&self.image_token).count();
        if places != images.len() || found != places {
            return Err(Error::Invalid {
                what: "images of a conversation".into(),
                why: format!(
                    "{} given, {places} places in the messages, {found} {} in the rendered text; \
                     all three must agree",
                    images.len(),
                    self.image_token
                ),
            });
        }
        let counts: Vec<usize> = images
            .iter()
            .map(|image| image.n_tokens(self.merge_size()))
            .collect();
        let expanded = expand_images(&rendered, &self.image_token, &counts);
        let encoding = caught(|| self.tokenizer.encode(expanded.text.as_str(), true))
            .map_err(|e| self.tokenizer_error(&e))?;
        let input_ids = encoding.get_ids().to_vec();
        let classes = self.classes(&input_ids, encoding.get_offsets(), &expanded.spans);
        let n_vision: usize = counts.iter().sum();
        let n_found = input_ids
            .iter()
            .filter(|id| **id == self.image_token_id)
            .count();
        if n_vision != n_found {
            return Err(Error::format(
                &self.dir.join("tokenizer.json"),
                self.image_token.as_str(),
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

/// Repeats the i-th placeholder `counts[i]` times and moves the spans along.
fn expand_images(rendered: &Rendered, token: &str, counts: &[usize]) -> Rendered {
    let mut text = String::with_capacity(rendered.text.len());
    let mut moves: Vec<Move> = Vec::with_capacity(counts.len());
    let mut copied = 0;
    for ((at, _), count) in rendered.text.match_indices(token).zip(counts) {
        text.push_str(&rendered.text[copied..at]);
        text.push_str(&token.repeat(*count));
        copied = at + token.len();
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

fn read_json(path: &Path) -> Result<Option<Value>> {
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

fn open_template(dir: &Path, tokenizer_config: &Value) -> Result<ChatTemplate> {
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
    let text = default_template(&value).ok_or_else(|| {
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

fn open_images(dir: &Path) -> Result<Preprocessor> {
    let nested = dir.join("processor_config.json");
    let own = dir.join("preprocessor_config.json");
    let inner = read_json(&nested)?.map(|mut v| v["image_processor"].take());
    let (path, value) = match inner.filter(Value::is_object) {
        Some(value) => (nested, value),
        None => {
            let value = read_json(&own)?;
            let value = value.ok_or_else(|| missing("preprocessor_config.json", dir))?;
            (own, value)
        }
    };
    let kind = value["image_processor_type"].as_str().unwrap_or_default();
    if !matches!(
        kind,
        "Qwen2VLImageProcessor" | "Qwen2VLImageProcessorFast" | "Qwen2VLImageProcessorPil"
    ) {
        return Err(Error::Unsupported {
            what: format!(
                "{}: image processor {kind:?}; supported is Qwen2VLImageProcessor",
                path.display()
            ),
        });
    }
    Preprocessor::from_json(&path, &value)
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
