//! One row of any data file, and what it means as a sample or a question.

use crate::dataset::image_source::{ImageFolder, ImageSource};
use crate::dataset::{Content, Question, Sample, Text};
use crate::processor::{ContentPart, Message, Role};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::PathBuf;
use std::sync::Arc;

/// The placeholder of an image in a text.
const PLACE: &str = "<image>";
/// Keys that make a row a conversation.
const CHAT_KEYS: [&str; 4] = ["conversations", "messages", "question", "query"];
/// Keys that name images.
const IMAGE_KEYS: [&str; 2] = ["image", "images"];
/// The column of an image as base64 text, as MME-RealWorld's parquet files have it.
pub(super) const BASE64_KEY: &str = "bytes";

/// The rows of a file, read as they are asked for; nothing sensible follows an error.
pub(super) type Records = Box<dyn Iterator<Item = Result<Record>> + Send>;

/// One row with its named values.
#[derive(Debug)]
pub(super) struct Record {
    pub path: PathBuf,
    /// "line 3" or "row 3", counted from 1.
    pub at: String,
    pub values: Map<String, Value>,
    /// Images that the file itself holds; if none, names in the row count.
    pub images: Vec<ImageSource>,
    /// Where image names are looked up.
    pub folder: Option<Arc<ImageFolder>>,
}

/// Turns whose image places are not counted yet.
struct Turns {
    messages: Vec<Message>,
    /// Images that the turns name themselves.
    images: Vec<ImageSource>,
}

impl Record {
    pub(super) fn origin(&self) -> String {
        format!("{} {}", self.path.display(), self.at)
    }

    pub(super) fn bad(&self, why: impl Into<String>) -> Error {
        Error::format(&self.path, self.at.as_str(), why)
    }

    pub(super) fn id(&self) -> String {
        let keys = ["id", "index", "question_id"];
        let id = keys.iter().find_map(|k| scalar(&self.values, k));
        id.unwrap_or_else(|| self.at.clone())
    }

    /// Whether the row is raw text: `text`, and nothing that makes a conversation.
    pub fn is_text(&self) -> bool {
        let has = |key: &&str| self.values.get(*key).is_some_and(|value| !value.is_null());
        has(&"text") && !CHAT_KEYS.iter().any(has)
    }

    /// The row as raw text.
    pub fn into_text(self) -> Result<Text> {
        if !self.row_images()?.is_empty() {
            return Err(self.bad("text: raw text has no place for the row's image"));
        }
        let text = self.values.get("text").and_then(Value::as_str);
        let text = text.ok_or_else(|| self.bad("text: a text expected"))?;
        if text.is_empty() {
            return Err(self.bad("text: it is empty"));
        }
        Ok(Text {
            id: self.id(),
            origin: self.origin(),
            text: text.to_owned(),
        })
    }

    /// The row as a conversation or raw text.
    pub fn into_sample(self) -> Result<Sample> {
        if self.is_text() {
            let Text { id, origin, text } = self.into_text()?;
            let content = Content::Text(text);
            return Ok(Sample {
                id,
                origin,
                content,
            });
        }
        let (messages, images) = self.chat()?;
        Ok(Sample {
            id: self.id(),
            origin: self.origin(),
            content: Content::Chat { messages, images },
        })
    }

    fn chat(&self) -> Result<(Vec<Message>, Vec<ImageSource>)> {
        let turns = self.turns()?;
        let mut images = self.row_images()?;
        images.extend(turns.images);
        let messages = self.with_places(turns.messages, images.len())?;
        if messages.is_empty() {
            return Err(self.bad("at least one message expected, none found"));
        }
        Ok((messages, images))
    }

    /// The row as a question: its own, or the first user turn and the answer to it.
    pub fn into_question(self) -> Result<Question> {
        let category = scalar(&self.values, "category");
        let answers = self.answers()?;
        let (messages, mut images) = self.chat()?;
        let user = messages.iter().position(|m| m.role == Role::User);
        let user = user.ok_or_else(|| Error::Missing {
            what: "user message".into(),
            place: self.origin(),
        })?;
        let reply = messages[user..].iter().find(|m| m.role == Role::Assistant);
        let reply = reply.map(Message::plain_text);
        let n_images = messages[..=user].iter().map(Message::n_images).sum();
        images.truncate(n_images);
        Ok(Question {
            id: self.id(),
            origin: self.origin(),
            images,
            question: messages[user].plain_text().trim().to_owned(),
            answers: answers.unwrap_or_else(|| reply.into_iter().collect()),
            category,
        })
    }

    fn turns(&self) -> Result<Turns> {
        if let Some(list) = list_of(&self.values, "conversations") {
            return self.llava_turns(list);
        }
        if let Some(list) = list_of(&self.values, "messages") {
            return self.chat_turns(list);
        }
        let question = self.question_text()?;
        let mut messages = vec![Message::text(Role::User, question)];
        if let Some(answer) = self.answers()?.and_then(|a| a.into_iter().next()) {
            messages.push(Message::text(Role::Assistant, answer));
        }
        let images = Vec::new();
        Ok(Turns { messages, images })
    }

    fn llava_turns(&self, list: &[Value]) -> Result<Turns> {
        let turn = |value: &Value| {
            let (from, text) = (value["from"].as_str(), value["value"].as_str());
            match (from, text) {
                (Some(from), Some(text)) => Ok(Message::text(self.role(from)?, text)),
                _ => {
                    Err(self.bad("conversations: turns {\"from\": text, \"value\": text} expected"))
                }
            }
        };
        Ok(Turns {
            messages: list.iter().map(turn).collect::<Result<_>>()?,
            images: Vec::new(),
        })
    }

    fn chat_turns(&self, list: &[Value]) -> Result<Turns> {
        let mut turns = Turns {
            messages: Vec::with_capacity(list.len()),
            images: Vec::new(),
        };
        for value in list {
            let role = value["role"].as_str();
            let role = self.role(role.ok_or_else(|| self.bad("messages: a role expected"))?)?;
            let content = match &value["content"] {
                Value::String(text) => vec![ContentPart::Text(text.clone())],
                Value::Array(parts) => {
                    let parts = parts.iter().map(|p| self.chat_part(p, &mut turns.images));
                    parts.collect::<Result<_>>()?
                }
                _ => return Err(self.bad("messages: content must be a text or a list of parts")),
            };
            turns.messages.push(Message { role, content });
        }
        Ok(turns)
    }

    /// A part names its image under `image`, `url`, `path` or `image_url`, or leaves it to the
    /// row's own images.
    fn chat_part(&self, part: &Value, images: &mut Vec<ImageSource>) -> Result<ContentPart> {
        let kind = part["type"].as_str();
        if let (None | Some("text"), Some(text)) = (kind, part["text"].as_str()) {
            return Ok(ContentPart::Text(text.to_owned()));
        }
        let address = &part["image_url"];
        let names = [
            &part["image"],
            address,
            &address["url"],
            &part["url"],
            &part["path"],
        ];
        let name = names.into_iter().find_map(Value::as_str);
        if !matches!(kind, None | Some("image" | "image_url")) || (kind.is_none() && name.is_none())
        {
            return Err(self.bad(format!(
                "messages: a text or image part expected, {part} found"
            )));
        }
        if let Some(name) = name {
            images.push(self.resolve(name)?);
        }
        Ok(ContentPart::Image)
    }

    fn role(&self, name: &str) -> Result<Role> {
        match name {
            "human" | "user" => Ok(Role::User),
            "gpt" | "assistant" | "model" => Ok(Role::Assistant),
            "system" => Ok(Role::System),
            _ => Err(self.bad(format!(
                "role {name:?} found; human, user, gpt, assistant or system expected"
            ))),
        }
    }

    fn question_text(&self) -> Result<String> {
        let question = scalar(&self.values, "question").or_else(|| scalar(&self.values, "query"));
        let question = question.ok_or_else(|| {
            self.bad("none of `conversations`, `messages`, `question` and `text` is present")
        })?;
        let options = ["A", "B", "C", "D", "E", "F", "G", "H"].into_iter();
        let options: Vec<String> = options
            .filter_map(|k| scalar(&self.values, k).map(|text| format!("{k}. {text}\n")))
            .collect();
        let hint = scalar(&self.values, "hint").map(|text| format!("Hint: {text}\n"));
        let hint = hint.unwrap_or_default();
        if options.is_empty() {
            return Ok(format!("{hint}{question}"));
        }
        Ok(format!(
            "{hint}Question: {question}\nOptions:\n{}\
             Please select the correct answer from the options above.",
            options.concat()
        ))
    }

    /// `answer`, or `answers`; `None` if neither is there.
    fn answers(&self) -> Result<Option<Vec<String>>> {
        for key in ["answers", "answer"] {
            match self.values.get(key) {
                None | Some(Value::Null) => {}
                Some(Value::Array(list)) => {
                    let texts: Option<Vec<String>> = list.iter().map(text_of).collect();
                    let why = || self.bad(format!("{key}: a list of texts expected"));
                    return texts.map(Some).ok_or_else(why);
                }
                Some(value) => {
                    let why = || self.bad(format!("{key}: a text expected, {value} found"));
                    return text_of(value).map(|t| Some(vec![t])).ok_or_else(why);
                }
            }
        }
        Ok(None)
    }

    /// The images of the row itself, not those that messages name.
    pub(super) fn row_images(&self) -> Result<Vec<ImageSource>> {
        if !self.images.is_empty() {
            return Ok(self.images.clone());
        }
        for key in IMAGE_KEYS {
            match self.values.get(key) {
                None | Some(Value::Null) => {}
                Some(Value::String(name)) => return Ok(vec![self.resolve(name)?]),
                Some(Value::Array(list)) => {
                    let images = list.iter().map(|v| match v.as_str() {
                        Some(name) => self.resolve(name),
                        None => Err(self.bad(format!("{key}: image names expected, {v} found"))),
                    });
                    return images.collect();
                }
                Some(v) => {
                    return Err(self.bad(format!("{key}: a name or list expected, {v} found")));
                }
            }
        }
        Ok(match self.values.get(BASE64_KEY) {
            Some(Value::String(text)) => vec![ImageSource::Base64 {
                name: format!("{}: {BASE64_KEY}", self.origin()),
                text: text.as_str().into(),
            }],
            _ => Vec::new(),
        })
    }

    fn resolve(&self, name: &str) -> Result<ImageSource> {
        match &self.folder {
            Some(folder) => folder.resolve(&self.origin(), name),
            None => Err(self.bad(format!("image {name:?} expected inside the file itself"))),
        }
    }

    /// The messages with each `<image>` of a user text made a place. Rows of question and answer
    /// have none written: there, every image stands before the question.
    fn with_places(&self, messages: Vec<Message>, n_images: usize) -> Result<Vec<Message>> {
        let mut messages: Vec<Message> = messages.into_iter().map(split_places).collect();
        let n_places: usize = messages.iter().map(Message::n_images).sum();
        let plain =
            !self.values.contains_key("conversations") && !self.values.contains_key("messages");
        if plain && n_places == 0 {
            if let Some(first) = messages.first_mut() {
                let places = std::iter::repeat_n(ContentPart::Image, n_images);
                first.content.splice(0..0, places);
            }
            return Ok(messages);
        }
        if n_places != n_images {
            return Err(self.bad(format!(
                "{n_places} image places ({PLACE} or image parts) but {n_images} images"
            )));
        }
        Ok(messages)
    }
}

/// Text around `<image>` in a user message; the line break that sets the placeholder apart from
/// the text, LLaVA's notation, belongs to the placeholder.
fn split_places(message: Message) -> Message {
    if message.role != Role::User {
        return message;
    }
    let mut content = Vec::with_capacity(message.content.len());
    for part in message.content {
        match part {
            ContentPart::Text(text) if text.contains(PLACE) => split_text(&text, &mut content),
            other => content.push(other),
        }
    }
    let role = message.role;
    Message { role, content }
}

fn split_text(text: &str, content: &mut Vec<ContentPart>) {
    let mut pieces = text.split(PLACE).peekable();
    let mut after_image = false;
    while let Some(piece) = pieces.next() {
        let piece = match piece.strip_prefix('\n') {
            Some(rest) if after_image => rest,
            _ => piece,
        };
        let last = pieces.peek().is_none();
        let piece = match piece.strip_suffix('\n') {
            Some(rest) if !last => rest,
            _ => piece,
        };
        if !piece.is_empty() {
            content.push(ContentPart::Text(piece.to_owned()));
        }
        if !last {
            content.push(ContentPart::Image);
            after_image = true;
        }
    }
}

fn list_of<'a>(values: &'a Map<String, Value>, key: &str) -> Option<&'a [Value]> {
    values.get(key).and_then(Value::as_array).map(Vec::as_slice)
}

/// A text, number or flag as text.
pub(crate) fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

/// A text, number or flag as text; empty texts count as absent.
fn scalar(values: &Map<String, Value>, key: &str) -> Option<String> {
    values
        .get(key)
        .and_then(text_of)
        .filter(|text| !text.is_empty())
}
