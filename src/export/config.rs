//! `config.json` of an output folder: the source's text with one key added or taken away.

use super::layout::ConfigEntry;
use crate::checkpoint::{CONFIG_FILE, Checkpoint};
use crate::{Error, Result};
use serde_json::Value;

/// Keys under which quantizations are described, in any format.
const KEYS: [&str; 2] = ["quantization_config", "quantization"];

/// The source's `config.json` with `entry` as its last key and no other quantization, otherwise
/// untouched: numbers are written as they are there.
///
/// # Errors
/// [`Error::Format`] if the text cannot be completed by a key.
pub(super) fn config_text(source: &Checkpoint, entry: Option<&ConfigEntry>) -> Result<String> {
    let text = plain_text(source.config_text(), source.config());
    let Some(ConfigEntry { key, value }) = entry else {
        return Ok(text);
    };
    let fail = |why: &str| Error::format(&source.dir().join(CONFIG_FILE), "JSON", why);
    let body = text.trim_end().strip_suffix('}');
    let body = body
        .ok_or_else(|| fail("expected a closing '}'"))?
        .trim_end();
    let separator = if body.ends_with('{') { "\n" } else { ",\n" };
    let added = format!("{value:#}").replace('\n', "\n  ");
    let whole = format!("{body}{separator}  \"{key}\": {added}\n}}\n");
    let mut expected = without_keys(source.config());
    if let Some(object) = expected.as_object_mut() {
        object.insert((*key).into(), value.clone());
    }
    match serde_json::from_str::<Value>(&whole) {
        Ok(parsed) if parsed == expected => Ok(whole),
        _ => Err(fail("cannot be completed by a quantization")),
    }
}

/// A configuration without what it says of any quantization.
pub(crate) fn without_keys(config: &Value) -> Value {
    let mut config = config.clone();
    if let Some(object) = config.as_object_mut() {
        KEYS.iter().for_each(|key| {
            object.shift_remove(*key);
        });
    }
    config
}

/// The text without any quantization: cut off where it is the last key, as we write it, else
/// written anew.
fn plain_text(text: &str, config: &Value) -> String {
    let plain = without_keys(config);
    if plain == *config {
        return text.to_owned();
    }
    let cut = KEYS.iter().find_map(|key| {
        let body = text[..text.rfind(&format!("\"{key}\""))?].trim_end();
        let whole = format!("{}\n}}\n", body.strip_suffix(',').unwrap_or(body));
        let is_plain = serde_json::from_str::<Value>(&whole).is_ok_and(|found| found == plain);
        is_plain.then_some(whole)
    });
    cut.unwrap_or_else(|| format!("{plain:#}\n"))
}

#[cfg(test)]
mod tests {
    use super::plain_text;
    use serde_json::Value;

    #[test]
    fn a_last_key_is_cut_off_and_another_taken_out() {
        let ours =
            "{\n  \"eps\": 1.0e-06,\n  \"quantization_config\": {\n    \"bits\": 4\n  }\n}\n";
        let text = |text: &str| plain_text(text, &serde_json::from_str::<Value>(text).unwrap());
        assert_eq!(text(ours), "{\n  \"eps\": 1.0e-06\n}\n");
        let first = "{\"quantization\": {\"bits\": 4}, \"a\": \"quantization\"}";
        assert_eq!(text(first), "{\n  \"a\": \"quantization\"\n}\n");
        assert_eq!(text("{\"quantization_config\": null}"), "{\n}\n");
        assert_eq!(text("{ }"), "{ }");
    }
}
