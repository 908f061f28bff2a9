//! Special tokens, whether they are put around a text, and the chat template.

use super::{Tokenizer, read_text};
use crate::Result;
use crate::gguf::Value;
use crate::processor::read_json;
use serde_json::Value as Json;
use std::collections::BTreeMap;

/// Roles of special tokens here and in the file, which spells some in its own way.
const ROLES: [(&str, &str); 9] = [
    ("bos", "bos"),
    ("eos", "eos"),
    ("unk", "unknown"),
    ("sep", "seperator"),
    ("pad", "padding"),
    ("cls", "cls"),
    ("mask", "mask"),
    ("eot", "eot"),
    ("eom", "eom"),
];

/// Texts of special tokens by role, and which are put around a text.
#[derive(Default)]
struct Special {
    texts: BTreeMap<&'static str, String>,
    added: BTreeMap<&'static str, bool>,
}

impl Tokenizer {
    pub(super) fn special(&self, config: &Json) -> Result<Vec<(String, Value)>> {
        let mut special = Special::default();
        for (role, _) in ROLES {
            let entry = &self.config[format!("{role}_token")];
            let text = entry.as_str().or_else(|| entry["content"].as_str());
            special
                .texts
                .extend(text.map(|text| (role, text.to_owned())));
        }
        for (role, other) in [("bos", "cls"), ("eos", "sep")] {
            if let (None, Some(text)) = (special.text(role), special.text(other)) {
                let text = text.to_owned();
                special.texts.insert(role, text);
            }
        }
        let post = &self.main["post_processor"];
        match post["processors"].as_array() {
            Some(list) => list.iter().for_each(|step| special.follow(step)),
            None => special.follow(post),
        }
        for role in ["bos", "eos", "sep"] {
            if let Some(adds) = self.config[format!("add_{role}_token")].as_bool() {
                special.added.entry(role).or_insert(adds);
            }
        }
        let mut keys = Vec::new();
        for (role, name) in ROLES {
            if let Some(id) = self.id_of(role, &special, config) {
                let key = format!("tokenizer.ggml.{name}_token_id");
                keys.push((key, Value::U32(id)));
            }
        }
        for (role, adds) in &special.added {
            keys.push((
                format!("tokenizer.ggml.add_{role}_token"),
                Value::Bool(*adds),
            ));
        }
        keys.extend(self.chat_templates()?);
        Ok(keys)
    }

    /// The id of a role: of its text among the added tokens, else as the model's configuration
    /// says.
    fn id_of(&self, role: &str, special: &Special, config: &Json) -> Option<u32> {
        let of_text = special.text(role).and_then(|text| {
            let token = self.added().find(|token| token["content"] == text);
            token.and_then(|token| token["id"].as_u64())
        });
        // The later roles are known by a template only.
        let key = format!("{role}_token_id");
        let of_config = || {
            let own = config.get(&key).filter(|id| !id.is_null());
            own.unwrap_or(&config["text_config"][&key]).as_u64()
        };
        let id = match role {
            "eot" | "eom" => of_text,
            _ => of_text.or_else(of_config),
        };
        id.and_then(|id| u32::try_from(id).ok())
    }

    /// The chat template, or several by name.
    fn chat_templates(&self) -> Result<Vec<(String, Value)>> {
        const KEY: &str = "tokenizer.chat_template";
        let mut found = self.config["chat_template"].clone();
        if found.is_null() {
            let text = read_text(&self.dir.join("chat_template.jinja"))?;
            found = text.map_or(Json::Null, Json::String);
        }
        if found.is_null() {
            let json = read_json(&self.dir.join("chat_template.json"))?;
            found = json.unwrap_or_default()["chat_template"].take();
        }
        if let Some(text) = found.as_str() {
            return Ok(vec![(KEY.into(), text.into())]);
        }
        let mut keys = Vec::new();
        let mut names = Vec::new();
        for entry in found.as_array().into_iter().flatten() {
            let (Some(name), Some(text)) = (entry["name"].as_str(), entry["template"].as_str())
            else {
                continue;
            };
            match name {
                "default" => keys.push((KEY.into(), text.into())),
                _ => {
                    let is_plain = |c: &char| c.is_ascii_alphanumeric() || *c == '_';
                    let name: String = name.chars().filter(is_plain).collect();
                    keys.push((format!("{KEY}.{name}"), text.into()));
                    names.push(name);
                }
            }
        }
        if !names.is_empty() {
            keys.push((format!("{KEY}s"), Value::Texts(names)));
        }
        Ok(keys)
    }
}

impl Special {
    fn text(&self, role: &str) -> Option<&str> {
        self.texts.get(role).map(String::as_str)
    }

    /// What a step of the post-processor puts around a text.
    fn follow(&mut self, step: &Json) {
        if step["type"] == "ByteLevel" {
            self.added.entry("bos").or_insert(false);
            self.added.entry("eos").or_insert(false);
        }
        if step["type"] != "TemplateProcessing" {
            return;
        }
        let special = |part: Option<&Json>| {
            part.and_then(|part| part["SpecialToken"]["id"].as_str().map(str::to_owned))
        };
        let empty = Vec::new();
        let single = step["single"].as_array().unwrap_or(&empty);
        if single.len() < 2 {
            return;
        }
        let (first, last) = (special(single.first()), special(single.last()));
        if let Some(first) = first {
            if self.text("bos").is_none() && self.text("cls") != Some(&first) {
                self.texts.insert("bos", first.clone());
            }
            let is_known = [self.text("bos"), self.text("cls")].contains(&Some(&first));
            self.added.insert("bos", is_known);
        }
        if let Some(last) = &last {
            if self.text("eos") != Some(last)
                && let Some(eos) = self.texts.insert("eos", last.clone())
            {
                // What ended a turn so far still does.
                let role = if self.texts.contains_key("eot") {
                    "eom"
                } else {
                    "eot"
                };
                self.texts.insert(role, eos);
            }
            self.added.insert("eos", true);
        }
        self.follow_pair(step, last.is_some());
    }

    /// Whether a separator stands between two texts.
    fn follow_pair(&mut self, step: &Json, has_last: bool) {
        let empty = Vec::new();
        let pair = step["pair"].as_array().unwrap_or(&empty);
        let place = |id: &str| pair.iter().position(|part| part["Sequence"]["id"] == id);
        let (Some(a), Some(b)) = (place("A"), place("B")) else {
            return;
        };
        let between = pair.get(a + 1..b).unwrap_or_default();
        if !between.is_empty() {
            let is_end = |part: &Json| {
                let id = part["SpecialToken"]["id"].as_str();
                id.is_some() && [self.text("sep"), self.text("eos")].contains(&id)
            };
            let separator = if has_last {
                between.get(1)
            } else {
                between.first()
            };
            let adds = separator.is_some_and(is_end);
            self.added.insert("sep", adds);
        }
    }
}
