//! A quantized folder once more, in another format, with a card of its own.

use crate::checkpoint::Checkpoint;
use crate::export::gguf::{self, GgufExported};
use crate::export::{Exported, Format, convert, plan_of};
use crate::model::ModelSource;
use crate::report::RunReport;
use crate::report::card::{BASE_CARD_FILE, CARD_FILE, Card};
use crate::report::importance::ImportanceFile;
use crate::report::page::{PAGE_FILE, Page};
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Writes the quantized `model` to the new folder `output`; `evaluation` is what `vlmq eval --json`
/// said of it, for the card.
///
/// # Errors
/// As [`plan_of`] and [`convert`]. Nothing is left behind then.
pub fn export_folder(
    model: &ModelSource,
    format: Format,
    output: &Path,
    evaluation: Option<&Value>,
) -> Result<Exported> {
    let source = model.checkpoint();
    let plan = plan_of(source)?;
    let report = report_of(source)?;
    let card = Card {
        name: &folder_name(output),
        source,
        decoder: model.decoder(),
        plan: &plan,
        format,
        report: report.as_ref(),
        evaluation,
    };
    let mut files = vec![(CARD_FILE.to_owned(), card.text().into_bytes())];
    files.extend(base_card(source, report.is_some())?);
    convert(source, format, &plan, output, &files)
}

/// Writes `model`, quantized or not, as GGUF files into the new folder `output`, with a card if it is
/// quantized.
///
/// # Errors
/// As [`gguf::export`]. Nothing is left behind then.
pub fn export_gguf(
    model: &ModelSource,
    output: &Path,
    evaluation: Option<&Value>,
) -> Result<GgufExported> {
    let source = model.checkpoint();
    if source.quantization().is_none() {
        return gguf::export(source, output, |_| Vec::new());
    }
    let plan = plan_of(source)?;
    let report = report_of(source)?;
    let base_card = base_card(source, report.is_some())?;
    let has_page = source.dir().join(PAGE_FILE).exists();
    let importance = ImportanceFile::read(source.dir())?;
    gguf::export(source, output, |exported| {
        let card = Card {
            name: &folder_name(output),
            source,
            decoder: model.decoder(),
            plan: &plan,
            format: Format::Gguf,
            report: report.as_ref(),
            evaluation,
        };
        let text = card.text_of_gguf(exported);
        let card = (CARD_FILE.to_owned(), text.into_bytes());
        let mut report = report.clone();
        if let Some(written) = report.as_mut().and_then(|report| report.output.as_mut()) {
            let files = [Some(&exported.model), exported.mmproj.as_ref()];
            written.tensor_bytes = files.iter().flatten().map(|file| file.tensor_bytes).sum();
        }
        let files = base_card.into_iter().chain([card]);
        let files = files.chain(report.as_ref().map(RunReport::to_file));
        match &report {
            Some(report) if has_page => {
                let name = folder_name(output);
                let page = Page::new(&name, report, importance.as_ref()).html();
                let page = (PAGE_FILE.to_owned(), page.into_bytes());
                let kept = importance.as_ref().map(ImportanceFile::to_file);
                files.chain([page]).chain(kept).collect()
            }
            _ => files.collect(),
        }
    })
}

/// The report of the run that made the codes, if the folder is of our making.
fn report_of(source: &Checkpoint) -> Result<Option<RunReport>> {
    RunReport::read(source.dir())
}

/// The card of the model that was quantized, under its other name; none if the folder has it under
/// that name already, or has only ours.
pub(crate) fn base_card(source: &Checkpoint, is_ours: bool) -> Result<Option<(String, Vec<u8>)>> {
    let path = source.dir().join(CARD_FILE);
    if is_ours || !path.exists() {
        return Ok(None);
    }
    let card = std::fs::read(&path).map_err(|e| Error::io(&path, "read", e))?;
    Ok(Some((BASE_CARD_FILE.to_owned(), card)))
}

/// What a folder is called.
pub(crate) fn folder_name(output: &Path) -> String {
    let name = output.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}
