//! ChartQA as its own repository has it: in a folder for each split `test_human.json` and
//! `test_augmented.json`, arrays of `{imgname, query, label}`, and a folder `png` with the images.

use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Kinds of questions, as the files' names end.
const KINDS: [&str; 2] = ["human", "augmented"];
/// The folder of images.
const IMAGES: &str = "png";

/// The files of a split's folder, those that there are.
pub(super) fn files(folder: &Path) -> Vec<PathBuf> {
    let splits = ["train", "val", "test"].into_iter();
    let names = splits.flat_map(|split| KINDS.map(|kind| format!("{split}_{kind}.json")));
    let files = names.map(|name| folder.join(name));
    files.filter(|file| file.is_file()).collect()
}

/// Gives such a row the columns of the published table: `image`, `question`, `answer`, and as `type`
/// the name of its file.
pub(super) fn rename(path: &Path, values: &mut Map<String, Value>) {
    let Some(image) = values.get("imgname").and_then(Value::as_str) else {
        return;
    };
    let image = format!("{IMAGES}/{image}");
    values.remove("imgname");
    values.insert("image".into(), image.into());
    for (from, to) in [("query", "question"), ("label", "answer")] {
        if let Some(value) = values.remove(from) {
            values.entry(to).or_insert(value);
        }
    }
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    if KINDS.iter().any(|kind| name.ends_with(kind)) {
        values.entry("type").or_insert(name.as_ref().into());
    }
}
