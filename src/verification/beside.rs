//! What lies beside the weights, held against the source: the configuration and all other files.

use crate::Result;
use crate::checkpoint::{CONFIG_FILE, Checkpoint};
use crate::export::{QUANTIZATION_FILES, differences, shared_differences, without_keys};
use crate::report::REPORT_FILE;
use crate::report::card::{BASE_CARD_FILE, CARD_FILE, is_our_card};
use crate::report::importance::IMPORTANCE_FILE;
use crate::report::page::PAGE_FILE;
use serde_json::Value;
use std::path::Path;

/// Files that are not the source's bytes in a folder of ours, and why.
const WRITTEN_ANEW: [(&str, &str); 4] = [
    (CONFIG_FILE, "it is compared key by key"),
    (REPORT_FILE, "it tells of the folder that it is in"),
    (PAGE_FILE, "it shows what the report tells"),
    (IMPORTANCE_FILE, "a run keeps its own"),
];

/// What of the source's configuration and files is not in a folder as it should be: everything, if
/// it `is_ours`. Other tools write these files anew, so that there the keys that both have count,
/// and that files are there.
pub(super) fn differences_beside(
    written: &Checkpoint,
    source: &Checkpoint,
    is_ours: bool,
) -> Result<Vec<String>> {
    let [expected, found] = [source, written].map(|folder| without_keys(folder.config()));
    let mut problems = match is_ours {
        true => differences("", &expected, &found),
        false => shared_differences("", &flat(expected), &flat(found)),
    };
    for problem in &mut problems {
        problem.insert_str(0, &format!("{CONFIG_FILE}: "));
    }
    let card = is_our_card(written.dir());
    for path in source.side_files()? {
        let name = source.side_name(&path)?;
        let is_anew = WRITTEN_ANEW.iter().any(|(anew, _)| *anew == name);
        let name_here = match name.as_str() {
            // Ours is in its place.
            CARD_FILE if is_ours && card => BASE_CARD_FILE,
            name => name,
        };
        let is_card_of_ours = name == CARD_FILE && is_our_card(source.dir());
        if QUANTIZATION_FILES.contains(&name.as_str()) || is_card_of_ours {
            continue;
        }
        let here = written.dir().join(name_here);
        if !here.exists() {
            let why = "is beside the source's weights and not here";
            problems.push(format!("{name_here}: {why}"));
        } else if is_ours && !is_anew && !has_same_bytes(&here, &path) {
            problems.push(format!(
                "{name_here}: its bytes are not those of the source's"
            ));
        }
    }
    Ok(problems)
}

/// A configuration with the decoder's keys at its top, where older ones have them.
fn flat(mut config: Value) -> Value {
    let decoder = config["text_config"].take();
    if let (Some(top), Value::Object(decoder)) = (config.as_object_mut(), decoder) {
        for (key, value) in decoder {
            top.entry(key).or_insert(value);
        }
    }
    config
}

fn has_same_bytes(a: &Path, b: &Path) -> bool {
    match [a, b].map(std::fs::read) {
        [Ok(a), Ok(b)] => a == b,
        _ => false,
    }
}
