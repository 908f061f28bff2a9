//! Chat templates: from messages to the text that the tokenizer reads, and which part of that text
//! came from whom.
//!
//! Templates are rendered by minijinja with the settings of transformers (`trim_blocks`,
//! `lstrip_blocks`, loop controls, Python's string methods, `raise_exception`, `tojson` without
//! HTML escapes). A prompt does not depend on the day: `strftime_now` is left undefined for
//! templates that test for it, which then take their fixed date, and gives a fixed day to the
//! others.
//!
//! Whose text is where is found by rendering a second time with private-use marks around every
//! text, which is how transformers itself tells user text from template text. If the text without
//! marks differs from the plain rendering, the template rewrites its input, and that is an error
//! rather than a guess.

mod day;

use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value as Jinja, ValueKind};
use minijinja::{Environment, ErrorKind};
use serde::Serialize;
use serde_json::{Value, json};
use std::ops::Range;
use std::path::Path;

const TEMPLATE: &str = "chat_template";
/// The marks that open and close a text: private-use characters that no script contains.
const OPEN: char = '\u{F8D0}';
const CLOSE: char = '\u{F8D1}';
/// Longest template that is compiled; the longest published ones have some 30 kB.
const MAX_TEMPLATE_BYTES: usize = 64 << 10;
/// What one rendering may cost: an instruction is 1, and so are 64 bytes of text. A conversation
/// of a thousand turns takes less than a fifth.
const FUEL: u64 = 500_000;
/// Stack for compiling and rendering. minijinja follows a chain of operators, and a list in a list,
/// by recursion; this is enough for the deepest that length and fuel allow.
const STACK_BYTES: usize = 256 << 20;
/// Lists in lists that are written as JSON; Python, too, stops somewhere.
const MAX_JSON_DEPTH: usize = 128;

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Instructions before the conversation.
    System,
    /// The human side.
    User,
    /// The model's side.
    Assistant,
}

impl Role {
    /// The template's name of the role.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// A piece of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContentPart {
    /// Text as it was written.
    Text(String),
    /// The place of the next image of the sample.
    Image,
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said, in order.
    pub content: Vec<ContentPart>,
}

impl Message {
    /// A message of one text.
    pub fn text(role: Role, text: impl Into<String>) -> Self {
        Self {
            role,
            content: vec![ContentPart::Text(text.into())],
        }
    }

    /// How many images the message refers to.
    pub fn n_images(&self) -> usize {
        let images = self.content.iter();
        images.filter(|p| matches!(p, ContentPart::Image)).count()
    }

    /// All texts of the message, one after the other.
    pub fn plain_text(&self) -> String {
        let texts = self.content.iter().filter_map(|part| match part {
            ContentPart::Text(text) => Some(text.as_str()),
            ContentPart::Image => None,
        });
        texts.collect()
    }

    fn to_json(&self, mark: impl Fn(&str) -> String) -> Value {
        let parts = self.content.iter().map(|part| match part {
            ContentPart::Text(text) => json!({"type": "text", "text": mark(text)}),
            ContentPart::Image => json!({"type": "image"}),
        });
        json!({"role": self.role.name(), "content": parts.collect::<Vec<_>>()})
    }
}

/// Bytes of a rendered text that a message brought in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextSpan {
    /// Bytes of the rendered text.
    pub bytes: Range<usize>,
    /// Who wrote them.
    pub role: Role,
}

/// A rendered conversation and where the messages' own texts stand in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The text, with one placeholder per image.
    pub text: String,
    /// Texts in order, without their leading and trailing white space, empty ones left out.
    pub spans: Vec<TextSpan>,
}

/// A compiled chat template with the special tokens that it may name.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: serde_json::Map<String, Value>,
    source: String,
}

impl ChatTemplate {
    /// Compiles `template`, which comes from the file or key called `source` in messages;
    /// `special_tokens` (`eos_token` and the like) are visible to it by name.
    ///
    /// # Errors
    /// [`Error::Format`] if the template is longer than 64 KiB, or does not parse, with the line.
    pub fn new(
        source: &str,
        template: &str,
        special_tokens: serde_json::Map<String, Value>,
    ) -> Result<Self> {
        if template.len() > MAX_TEMPLATE_BYTES {
            let why = format!(
                "{} bytes, at most {MAX_TEMPLATE_BYTES} expected",
                template.len()
            );
            return Err(Error::format(Path::new(source), "chat template", why));
        }
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        let syntax = syntax.build().map_err(|e| template_error(source, &e))?;
        environment.set_syntax(syntax);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        if !template.contains("strftime_now is") {
            environment.add_function("strftime_now", day::strftime_now);
        }
        environment.add_filter("tojson", to_json_filter);
        let template = without_generation_tags(template);
        on_large_stack(source, || {
            environment.add_template_owned(TEMPLATE, template)
        })?;
        Ok(Self {
            environment,
            special_tokens,
            source: source.to_owned(),
        })
    }

    /// The text of `messages`, with the opening of the assistant's answer if wanted.
    ///
    /// # Errors
    /// [`Error::Format`] if the template fails, with its own reason if it raised one.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let messages = messages.iter().map(|m| m.to_json(str::to_owned)).collect();
        self.render_json(messages, add_generation_prompt)
    }

    /// Like [`ChatTemplate::render`], and where each message's text stands.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; [`Error::Unsupported`] if the template rewrites the texts, so
    /// that they cannot be found again; [`Error::Invalid`] if a text holds one of the two
    /// private-use characters that serve as marks.
    pub fn render_spans(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Rendered> {
        let plain = self.render(messages, add_generation_prompt)?;
        if plain.contains([OPEN, CLOSE]) {
            return Err(Error::Invalid {
                what: "message".into(),
                why: "the private-use characters U+F8D0 and U+F8D1 are not allowed".into(),
            });
        }
        let marked = messages.iter().map(|m| m.to_json(mark)).collect();
        let marked = self.render_json(marked, add_generation_prompt)?;
        let roles = messages.iter().flat_map(|m| {
            m.content.iter().filter_map(|part| match part {
                ContentPart::Text(text) if !text.trim().is_empty() => Some(m.role),
                _ => None,
            })
        });
        let rendered = unmark(&marked, roles);
        match rendered {
            Some(rendered) if rendered.text == plain => Ok(rendered),
            _ => Err(Error::Unsupported {
                what: format!(
                    "{}: the chat template reorders or rewrites message texts, so answer tokens \
                     cannot be told from prompt tokens",
                    self.source
                ),
            }),
        }
    }

    fn render_json(&self, messages: Vec<Value>, add_generation_prompt: bool) -> Result<String> {
        let mut context = self.special_tokens.clone();
        context.insert("messages".into(), Value::Array(messages));
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        context.insert("tools".into(), Value::Null);
        context.insert("documents".into(), Value::Null);
        let context = Value::Object(context);
        on_large_stack(&self.source, || {
            let template = self.environment.get_template(TEMPLATE)?;
            template.render(jinja_from_json(&context))
        })
    }
}

/// Does `work` with the template called `source` on a thread of its own, where its error, too,
/// is let go: it may hold values of the template.
fn on_large_stack<T: Send>(
    source: &str,
    work: impl FnOnce() -> std::result::Result<T, minijinja::Error> + Send,
) -> Result<T> {
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
    std::thread::scope(|scope| {
        let work = || work().map_err(|e| template_error(source, &e));
        let fail = |e| Error::io(Path::new(source), "start a thread for", e);
        let done = thread.spawn_scoped(scope, work).map_err(fail)?.join();
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn template_error(source: &str, error: &minijinja::Error) -> Error {
    let at = match error.line() {
        Some(line) => format!("chat template line {line}"),
        None => "chat template".to_owned(),
    };
    let why = error
        .detail()
        .map_or_else(|| error.to_string(), str::to_owned);
    Error::format(Path::new(source), at, why)
}

fn raise_exception(message: String) -> std::result::Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// `{% generation %}` only marks the answer for training masks; it changes no text.
fn without_generation_tags(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(start) = rest.find("{%") {
        let inside = start + 2;
        let Some(length) = rest[inside..].find("%}") else {
            break;
        };
        let tag = &rest[inside..inside + length];
        let name = tag.trim_matches(['-', '+']).trim();
        out.push_str(&rest[..inside]);
        match name {
            "generation" => out.push_str(&tag.replace(name, "if true")),
            "endgeneration" => out.push_str(&tag.replace(name, "endif")),
            _ => out.push_str(tag),
        }
        out.push_str("%}");
        rest = &rest[inside + length + 2..];
    }
    out.push_str(rest);
    out
}

/// Marks around the text without its outer white space, which templates may trim.
fn mark(text: &str) -> String {
    let core = text.trim();
    if core.is_empty() {
        return text.to_owned();
    }
    let lead = &text[..text.len() - text.trim_start().len()];
    let tail = &text[text.trim_end().len()..];
    format!("{lead}{OPEN}{core}{CLOSE}{tail}")
}

/// The text without marks and its spans, or `None` if the marks do not pair up with `roles`.
fn unmark(marked: &str, mut roles: impl Iterator<Item = Role>) -> Option<Rendered> {
    let mut text = String::with_capacity(marked.len());
    let mut spans = Vec::new();
    let mut opened = None;
    for c in marked.chars() {
        match c {
            OPEN if opened.is_none() => opened = Some(text.len()),
            CLOSE => spans.push(TextSpan {
                bytes: opened.take()?..text.len(),
                role: roles.next()?,
            }),
            OPEN => return None,
            _ => text.push(c),
        }
    }
    (opened.is_none() && roles.next().is_none()).then_some(Rendered { text, spans })
}

fn jinja_from_json(value: &Value) -> Jinja {
    match value {
        Value::Null => Jinja::from(()),
        Value::Bool(flag) => Jinja::from(*flag),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(n), _) => Jinja::from(n),
            (None, Some(n)) => Jinja::from(n),
            (None, None) => Jinja::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Value::String(text) => Jinja::from(text.as_str()),
        Value::Array(list) => Jinja::from(list.iter().map(jinja_from_json).collect::<Vec<_>>()),
        Value::Object(map) => {
            let pairs = map.iter();
            Jinja::from_pairs(pairs.map(|(k, v)| (k.as_str(), jinja_from_json(v))))
        }
    }
}

/// The value in JSON, which may hold `depth` levels of lists and maps.
fn json_from_jinja(value: &Jinja, depth: usize) -> std::result::Result<Value, minijinja::Error> {
    let inner = |value: &Jinja| match depth.checked_sub(1) {
        Some(depth) => json_from_jinja(value, depth),
        None => {
            let why = format!("more than {MAX_JSON_DEPTH} lists in lists have no JSON form");
            Err(minijinja::Error::new(ErrorKind::BadSerialization, why))
        }
    };
    Ok(match value.kind() {
        ValueKind::None => Value::Null,
        ValueKind::Bool => Value::Bool(value.is_true()),
        ValueKind::Number if value.is_integer() => match value.as_i64() {
            Some(n) => n.into(),
            None => u64::try_from(value.clone())?.into(),
        },
        ValueKind::Number => f64::try_from(value.clone())?.into(),
        ValueKind::String => value.as_str().unwrap_or_default().into(),
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter()?.map(|item| inner(&item));
            Value::Array(items.collect::<std::result::Result<_, _>>()?)
        }
        ValueKind::Map => {
            let mut map = serde_json::Map::new();
            for key in value.try_iter()? {
                map.insert(key.to_string(), inner(&value.get_item(&key)?)?);
            }
            Value::Object(map)
        }
        kind => {
            let why = format!("a value of kind {kind} has no JSON form");
            return Err(minijinja::Error::new(ErrorKind::BadSerialization, why));
        }
    })
}

/// JSON spelled as Python's `json.dumps(x, ensure_ascii=False, indent=…)`.
fn to_json_filter(value: Jinja, kwargs: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let value = json_from_jinja(&value, MAX_JSON_DEPTH)?;
    let mut out = Vec::new();
    let failed = |e: serde_json::Error| {
        minijinja::Error::new(ErrorKind::BadSerialization, "value has no JSON form").with_source(e)
    };
    match indent {
        Some(width) => {
            let spaces = vec![b' '; width.min(16)];
            let formatter = serde_json::ser::PrettyFormatter::with_indent(&spaces);
            let mut json = serde_json::Serializer::with_formatter(&mut out, formatter);
            value.serialize(&mut json).map_err(failed)?;
        }
        None => {
            let mut json = serde_json::Serializer::with_formatter(&mut out, PythonSpacing);
            value.serialize(&mut json).map_err(failed)?;
        }
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// A space after every comma and colon.
struct PythonSpacing;

impl serde_json::ser::Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(text: &str) -> ChatTemplate {
        ChatTemplate::new("test.jinja", text, serde_json::Map::new()).unwrap()
    }

    const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n\
        {% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}\
        {% endif %}{% endfor %}<|im_end|>\n{% endfor %}";

    #[test]
    fn spans_point_at_each_text() {
        let messages = [
            Message {
                role: Role::User,
                content: vec![ContentPart::Image, ContentPart::Text("\nuser? ".into())],
            },
            Message::text(Role::Assistant, "a"),
        ];
        let out = template(CHATML).render_spans(&messages, false).unwrap();
        let found: Vec<_> = out
            .spans
            .iter()
            .map(|s| &out.text[s.bytes.clone()])
            .collect();
        assert_eq!(found, ["user?", "a"]);
        assert_eq!(out.spans[1].role, Role::Assistant);
        assert!(out.text.contains("<image>\nuser? <|im_end|>"));
    }

    #[test]
    fn trimming_templates_keep_their_spans() {
        let trims = template("{% for m in messages %}[{{ m.content[0].text | trim }}]{% endfor %}");
        let out = trims
            .render_spans(&[Message::text(Role::User, "  x y ")], false)
            .unwrap();
        assert_eq!(out.text, "[x y]");
        assert_eq!(out.spans[0].bytes, 1..4);
    }

    #[test]
    fn rewriting_templates_are_refused() {
        let upper = template("{% for m in messages %}{{ m.content[0].text[1:] }}{% endfor %}");
        let error = upper.render_spans(&[Message::text(Role::User, "abc")], false);
        assert!(matches!(error, Err(Error::Unsupported { .. })));
    }

    #[test]
    fn the_day_is_a_fixed_one_and_unknown_to_those_who_test_for_it() {
        let asks = "{{ strftime_now('%d %B') }}";
        assert_eq!(template(asks).render(&[], false).unwrap(), "26 July");
        let tests = format!("{{% if strftime_now is defined %}}{asks}{{% else %}}no{{% endif %}}");
        assert_eq!(template(&tests).render(&[], false).unwrap(), "no");
    }

    #[test]
    fn a_raised_exception_reaches_the_user() {
        let raises = template("{{ raise_exception('roles must alternate') }}");
        let message = raises.render(&[], false).unwrap_err().to_string();
        assert!(message.contains("roles must alternate"), "{message}");
        assert!(message.contains("test.jinja"), "{message}");
        assert!(ChatTemplate::new("t", "{% if %}", serde_json::Map::new()).is_err());
    }

    #[test]
    fn json_is_spelled_as_python_does_and_generation_tags_vanish() {
        let text = "{% generation %}{{ messages[0] | tojson }}{%- endgeneration -%}";
        let out = template(text)
            .render(&[Message::text(Role::User, "<é>")], false)
            .unwrap();
        let expected = r#"{"role": "user", "content": [{"type": "text", "text": "<é>"}]}"#;
        assert_eq!(out, expected);
    }

    fn why(text: &str) -> String {
        let rendered = ChatTemplate::new("test.jinja", text, serde_json::Map::new())
            .and_then(|t| t.render(&[Message::text(Role::User, "q")], false));
        rendered.unwrap_err().to_string()
    }

    #[test]
    fn a_tag_does_not_end_with_the_sign_that_begins_it() {
        for text in ["{%}", "a {%} b %}"] {
            assert!(why(text).contains("unknown `}`"), "{}", why(text));
        }
    }

    #[test]
    fn a_rendering_has_an_end() {
        let loops = "{% for i in range(9000) %}{% for j in range(9000) %}{% endfor %}{% endfor %}";
        for text in [loops, "{{ 'abcdefghij' * 10000000 }}"] {
            assert!(why(text).contains("fuel"), "{}", why(text));
        }
        let long = " ".repeat(MAX_TEMPLATE_BYTES + 1);
        assert!(why(&long).contains("65537 bytes"), "{}", why(&long));
    }

    #[test]
    fn a_conversation_of_a_thousand_turns_is_far_from_that_end() {
        let qwen = include_str!("../../testdata/processor/qwen2_vl.jinja");
        let turns = [Role::User, Role::Assistant].into_iter().cycle().take(1000);
        let messages: Vec<_> = turns
            .map(|role| Message::text(role, "word ".repeat(100)))
            .collect();
        let mut template = template(qwen);
        template.environment.set_fuel(Some(FUEL / 5));
        assert!(template.render(&messages, true).is_ok());
    }

    #[test]
    fn lists_in_lists_and_chains_do_not_exhaust_the_stack() {
        let nested = |tail: &str| {
            format!(
                "{{% set ns = namespace(x=[]) %}}{{% for i in range(9000) %}}\
                 {{% set ns.x = [ns.x] %}}{{% endfor %}}{tail}"
            )
        };
        let printed = template(&nested("{{ ns.x }}")).render(&[], false);
        assert_eq!(printed.unwrap().len(), 2 * 9001);
        let json = why(&nested("{{ ns.x | tojson }}"));
        assert!(json.contains("lists in lists"), "{json}");
        let chain = why(&format!("{{{{ a{} }}}}", ".a".repeat(30_000)));
        assert!(chain.contains("undefined"), "{chain}");
    }

    #[test]
    fn marks_in_a_message_are_refused() {
        let messages = [Message::text(Role::User, "a\u{F8D0}b")];
        assert!(template(CHATML).render_spans(&messages, false).is_err());
    }
}
