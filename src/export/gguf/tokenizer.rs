//! The tokenizer as keys of the file: tokens and their kinds, merges, special tokens, chat
//! template.
//!
//! Byte-level BPE of `tokenizer.json` is written. How text is cut before merging is no data in GGUF
//! but a name, behind which llama.cpp has the rules in code. Its converter tells the name by
//! hashing what a test text becomes, which knows published vocabularies only. Here the rules
//! themselves are compared, so that a vocabulary of one's own with known rules has its name too,
//! and unknown rules are refused.
//!
//! Source: ggml-org/llama.cpp `conversion/base.py` (`get_vocab_base`), `gguf-py/gguf/vocab.py`
//! (`SpecialVocab`), `src/llama-vocab.cpp`. Differs: the above; and a token's text is not sent
//! through the tokenizer and back.

mod special;

use crate::checkpoint::Checkpoint;
use crate::gguf::Value;
use crate::processor::read_json;
use crate::{Error, Result};
use serde_json::Value as Json;
use std::path::{Path, PathBuf};

/// Largest vocabulary that is written.
const MAX_TOKENS: usize = 1 << 24;

/// Kinds of tokens, as numbers in the file.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// Rules by which text is cut before merging, and their name.
struct Rules {
    name: &'static str,
    steps: &'static [Step],
    /// Whether a piece that is a token is taken without merging.
    ignores_merges: bool,
}

/// One of a pre-tokenizer's steps.
#[derive(Debug, PartialEq)]
enum Step {
    /// A piece for each match of a pattern, and for what is between.
    Split(&'static str),
    /// Each digit by itself.
    Digits,
    /// Bytes as letters, after GPT-2's own pattern if so.
    Bytes { splits: bool },
}

const RULES: [Rules; 5] = [
    Rules {
        name: "qwen2",
        steps: &[
            Step::Split(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
            Step::Bytes { splits: false },
        ],
        ignores_merges: false,
    },
    Rules {
        name: "llama-bpe",
        steps: &[
            Step::Split(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
            Step::Bytes { splits: false },
        ],
        ignores_merges: true,
    },
    Rules {
        name: "tekken",
        steps: &[
            Step::Split(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
            Step::Bytes { splits: false },
        ],
        ignores_merges: true,
    },
    Rules {
        name: "smollm",
        steps: &[Step::Digits, Step::Bytes { splits: true }],
        ignores_merges: false,
    },
    Rules {
        name: "gpt-2",
        steps: &[Step::Bytes { splits: true }],
        ignores_merges: false,
    },
];

/// A checkpoint's tokenizer.
struct Tokenizer {
    dir: PathBuf,
    path: PathBuf,
    /// `tokenizer.json`.
    main: Json,
    /// `tokenizer_config.json`, null if there is none.
    config: Json,
}

/// The keys of a checkpoint's tokenizer, of `vocab_size` tokens in all; for llama.cpp's `llama`
/// architecture with what its converter adds there.
///
/// # Errors
/// [`Error::Missing`] without `tokenizer.json`; [`Error::Format`] for a damaged one, or tokens
/// beyond `vocab_size`; [`Error::Unsupported`] for one that is not byte-level BPE with known rules.
pub(super) fn keys(
    checkpoint: &Checkpoint,
    vocab_size: usize,
    is_llama: bool,
) -> Result<Vec<(String, Value)>> {
    let dir = checkpoint.dir();
    let path = dir.join("tokenizer.json");
    let main = read_json(&path)?.ok_or_else(|| Error::Missing {
        what: "tokenizer.json".into(),
        place: dir.display().to_string(),
    })?;
    let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_default();
    let dir = dir.to_path_buf();
    let tokenizer = Tokenizer {
        dir,
        path,
        main,
        config,
    };
    let rules = tokenizer.rules()?;
    let tokens = tokenizer.tokens(vocab_size)?;
    let mut keys = vec![
        ("tokenizer.ggml.model".into(), "gpt2".into()),
        ("tokenizer.ggml.pre".into(), rules.into()),
        ("tokenizer.ggml.tokens".into(), Value::Texts(tokens.texts)),
        (
            "tokenizer.ggml.token_type".into(),
            Value::I32s(tokens.kinds),
        ),
        (
            "tokenizer.ggml.merges".into(),
            Value::Texts(tokenizer.merges()?),
        ),
    ];
    keys.extend(tokenizer.special(checkpoint.config())?);
    if is_llama {
        tokenizer.add_llama_keys(vocab_size, &mut keys);
    }
    Ok(keys)
}

/// Texts and kinds of all tokens, by id.
struct Tokens {
    texts: Vec<String>,
    kinds: Vec<i32>,
}

impl Tokenizer {
    fn wrong(&self, at: &str, why: impl Into<String>) -> Error {
        Error::format(&self.path, at, why)
    }

    /// The name of the rules.
    fn rules(&self) -> Result<&'static str> {
        let model = &self.main["model"];
        let refuse = |what: String| {
            let path = self.path.display();
            let what = format!(
                "{path}: {what} in a GGUF file; byte-level BPE cut as by qwen2, llama-bpe, tekken, \
                 smollm or gpt-2 is written"
            );
            Err(Error::Unsupported { what })
        };
        if model["type"] != "BPE" {
            return refuse(format!("a tokenizer of type {}", model["type"]));
        }
        if model["byte_fallback"].as_bool() == Some(true) {
            return refuse("a BPE tokenizer with byte_fallback".into());
        }
        let normalizer = &self.main["normalizer"];
        // llama.cpp never normalizes; text in NFC, as nearly all is, is the same without.
        if !normalizer.is_null() && normalizer["type"] != "NFC" {
            return refuse(format!("normalizer {}", normalizer["type"]));
        }
        let pre = &self.main["pre_tokenizer"];
        let steps: Vec<&Json> = match (&pre["type"], pre["pretokenizers"].as_array()) {
            (kind, Some(list)) if kind == "Sequence" => list.iter().collect(),
            _ => vec![pre],
        };
        let ignores_merges = model["ignore_merges"].as_bool().unwrap_or(false);
        let fits = |rules: &&Rules| {
            let is_same = |(step, json): (&Step, &&Json)| step.is(json);
            rules.ignores_merges == ignores_merges
                && rules.steps.len() == steps.len()
                && rules.steps.iter().zip(&steps).all(is_same)
        };
        match RULES.iter().find(fits) {
            Some(rules) => Ok(rules.name),
            None => refuse(format!(
                "ignore_merges {ignores_merges} with pre_tokenizer {pre}"
            )),
        }
    }

    fn tokens(&self, vocab_size: usize) -> Result<Tokens> {
        if vocab_size > MAX_TOKENS {
            let why = format!("{vocab_size} tokens, at most {MAX_TOKENS} expected");
            return Err(self.wrong("vocab_size of config.json", why));
        }
        let mut tokens = Tokens {
            texts: (0..vocab_size).map(|id| format!("[PAD{id}]")).collect(),
            kinds: vec![UNUSED; vocab_size],
        };
        let vocab = self.main["model"]["vocab"].as_object();
        let vocab = vocab.ok_or_else(|| self.wrong("model.vocab", "expected an object"))?;
        for (text, id) in vocab {
            self.set(&mut tokens, text, id, NORMAL)?;
        }
        for token in self.added() {
            let text = token["content"].as_str().unwrap_or_default();
            let is_special = token["special"].as_bool().unwrap_or(false);
            match is_special || looks_special(text) {
                true => self.set(&mut tokens, text, &token["id"], CONTROL)?,
                false => {
                    let text = text.replace('\u{2581}', " ");
                    self.set(&mut tokens, &text, &token["id"], USER_DEFINED)?;
                }
            }
        }
        Ok(tokens)
    }

    fn set(&self, tokens: &mut Tokens, text: &str, id: &Json, kind: i32) -> Result<()> {
        let n = tokens.kinds.len();
        let id = id.as_u64().filter(|id| *id < n as u64).ok_or_else(|| {
            let why = format!("expected an id below vocab_size {n} of config.json, found {id}");
            self.wrong(&format!("token {text:?}"), why)
        })?;
        text.clone_into(&mut tokens.texts[id as usize]);
        tokens.kinds[id as usize] = kind;
        Ok(())
    }

    /// The tokens added to the model's own.
    fn added(&self) -> impl Iterator<Item = &Json> {
        self.main["added_tokens"].as_array().into_iter().flatten()
    }

    /// Whether a space is put before a text, and that SmolLM's vocabulary has no first token, which
    /// its files do not say.
    fn add_llama_keys(&self, vocab_size: usize, keys: &mut Vec<(String, Value)>) {
        const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
        if let Some(adds) = self.config["add_prefix_space"].as_bool() {
            keys.push(("tokenizer.ggml.add_space_prefix".into(), Value::Bool(adds)));
        }
        if vocab_size == 49_152 {
            keys.retain(|(key, _)| key != ADD_BOS);
            keys.push((ADD_BOS.into(), Value::Bool(false)));
        }
    }

    /// Merges as two texts with a space between.
    fn merges(&self) -> Result<Vec<String>> {
        let merges = self.main["model"]["merges"].as_array();
        let merges = merges.ok_or_else(|| self.wrong("model.merges", "expected a list"))?;
        let text_of = |merge: &Json| match merge {
            Json::String(text) => Some(text.clone()),
            Json::Array(pair) => match pair.as_slice() {
                // A space inside is byte-level BPE's letter for it.
                [Json::String(a), Json::String(b)] => {
                    let turned = |text: &str| text.replace(' ', "\u{120}");
                    Some(format!("{} {}", turned(a), turned(b)))
                }
                _ => None,
            },
            _ => None,
        };
        let texts = merges.iter().map(text_of).collect::<Option<_>>();
        texts.ok_or_else(|| self.wrong("model.merges", "expected pairs of texts"))
    }
}

impl Step {
    fn is(&self, json: &Json) -> bool {
        match self {
            Self::Split(pattern) => {
                json["type"] == "Split"
                    && json["pattern"]["Regex"] == *pattern
                    && json["behavior"] == "Isolated"
                    && json["invert"] != true
            }
            Self::Digits => json["type"] == "Digits" && json["individual_digits"] == true,
            Self::Bytes { splits } => {
                json["type"] == "ByteLevel"
                    && json["add_prefix_space"] != true
                    && json["use_regex"].as_bool().unwrap_or(true) == *splits
            }
        }
    }
}

/// Whether an added token that is not marked special is one all the same.
fn looks_special(text: &str) -> bool {
    let framed = |start, end| text.starts_with(start) && text.ends_with(end);
    ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&text)
        || framed("<|", "|>")
        || framed("<\u{ff5c}", "\u{ff5c}>")
        || framed("<unused", ">")
}

/// A file's text; `None` if there is no such file.
fn read_text(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, "read", e)),
    }
}

#[cfg(test)]
mod tests;
