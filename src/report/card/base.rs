//! The name under which the model that was quantized is published, where a folder tells.

use super::{CARD_FILE, is_our_card, of_head};
use crate::checkpoint::Checkpoint;
use std::path::Path;

/// `owner/name`, from the card that we wrote of the folder when it was quantized, from its place in
/// a download cache, or from its configuration.
pub(super) fn published_name(source: &Checkpoint) -> Option<String> {
    let dir = source.dir();
    let of_card = || {
        let card = std::fs::read_to_string(dir.join(CARD_FILE)).ok()?;
        of_head(&card, "base_model").filter(|_| is_our_card(dir))
    };
    let of_config = || {
        let name = source.config().get("_name_or_path")?.as_str()?;
        Some(name.to_owned())
    };
    let found = of_card().or_else(|| of_cache(dir)).or_else(of_config)?;
    is_published(&found).then_some(found)
}

/// From `models--owner--name/snapshots/revision`.
fn of_cache(dir: &Path) -> Option<String> {
    let snapshots = dir
        .parent()
        .filter(|parent| parent.ends_with("snapshots"))?;
    let repository = snapshots.parent()?.file_name()?.to_str()?;
    Some(repository.strip_prefix("models--")?.replacen("--", "/", 1))
}

/// Whether it has the form of a name on the hub; paths of somebody's machine have not.
fn is_published(name: &str) -> bool {
    let is_word = |word: &str| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        word.starts_with(|c: char| c.is_ascii_alphanumeric()) && word.chars().all(is_plain)
    };
    let parts: Vec<&str> = name.split('/').collect();
    parts.len() == 2 && parts.into_iter().all(is_word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_and_a_configuration_name_the_model() {
        let cached = Path::new("/c/models--Qwen--Qwen2-VL-2B-Instruct/snapshots/895c");
        assert_eq!(of_cache(cached).unwrap(), "Qwen/Qwen2-VL-2B-Instruct");
        assert_eq!(of_cache(Path::new("/c/models--a--b/other/895c")), None);
        assert!(is_published("Qwen/Qwen2-VL-2B-Instruct"));
        for path in [
            "/data/model",
            "./model",
            "model",
            "a/b/c",
            "../x",
            "a/b c",
            "",
        ] {
            assert!(!is_published(path), "{path}");
        }
    }
}
