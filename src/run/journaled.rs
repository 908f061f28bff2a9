//! Where layers go as they are finished: to the output folder in the making and to the journal at
//! once, which keeps them if the run is ended.

use super::samples::{SampleChoice, load_samples};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::write::MAX_SHARD_BYTES;
use crate::conversion::{base_card, export_gguf, folder_name};
use crate::export::gguf::imatrix_file;
use crate::export::{Exported, Exporter, Format, ModulePlan};
use crate::families::open_model;
use crate::gguf::IMATRIX_FILE;
use crate::journal::{Journal, LayerWriter};
use crate::model::{ChangedTensor, ModelSource, Module};
use crate::pipeline::{FinishedLayer, LayerOutcome, LayerSink, Observer};
use crate::recipe::Recipe;
use crate::report::card::{CARD_FILE, Card};
use crate::report::importance::{self, ImportanceFile, KeptWeights, ShownSample};
use crate::report::page::{PAGE_FILE, Page};
use crate::report::{OutputReport, RunReport};
use crate::tuning::{self, TuningReport};
use crate::{Error, QuantizedWeight, Result};
use candle_core::Device;
use std::path::Path;

/// Modules go to the output folder and to the journal at once.
pub(super) struct Journaled<'a> {
    pub(super) model: &'a ModelSource,
    pub(super) exporter: Exporter<'a>,
    pub(super) journal: Journal,
    /// The layer at work.
    pub(super) layer: Option<LayerWriter>,
    /// All modules, where their scales are going to be tuned before they go to the folder.
    pub(super) kept: Option<Vec<(Module, QuantizedWeight)>>,
    /// Where the report is to be a page too.
    pub(super) pictures: Option<Pictures>,
}

/// What the pictures of the report are made of.
#[derive(Default)]
pub(super) struct Pictures {
    /// Places of the samples among all.
    pub(super) kept: Vec<usize>,
    pub(super) samples: Vec<ShownSample>,
    pub(super) layers: Vec<Vec<KeptWeights>>,
}

impl Pictures {
    fn into_file(self) -> Option<ImportanceFile> {
        (!self.samples.is_empty()).then_some(ImportanceFile {
            schema: importance::SCHEMA,
            samples: self.samples,
            layers: self.layers,
        })
    }
}

impl Journaled<'_> {
    fn export(&mut self, module: &Module, weight: &QuantizedWeight) -> Result<()> {
        match &mut self.kept {
            Some(kept) => {
                kept.push((module.clone(), weight.clone()));
                Ok(())
            }
            None => self.exporter.write_module(&module.name, weight),
        }
    }

    /// Tunes the scales of all modules, where the recipe says so, and writes them. The samples,
    /// which the layers used up, are made again; the journal keeps the untuned layers, so a run that
    /// is ended here comes back to here.
    pub(super) fn tune(
        &mut self,
        recipe: &Recipe,
        choice: Option<&SampleChoice>,
        memory_bytes: u64,
        observer: &dyn Observer,
    ) -> Result<Option<TuningReport>> {
        let (Some(settings), Some(weights)) = (recipe.tuning(), self.kept.take()) else {
            return Ok(None);
        };
        let dir = self.journal.dir();
        let choice = choice.map(|choice| settings.choice(choice));
        let choice = choice.as_ref();
        let set = load_samples(self.model, recipe, choice, memory_bytes, dir, observer)?;
        let tuned = tuning::tune(self.model, &set, weights, settings, observer)?;
        for (module, weight) in &tuned.weights {
            self.exporter.write_module(&module.name, weight)?;
        }
        Ok(Some(tuned.report))
    }
}

impl Journaled<'_> {
    /// Leaves the importance of input columns beside the model.
    pub(super) fn write_imatrix(&self, layers: &[LayerOutcome], report: &RunReport) -> Result<()> {
        let squares = layers.iter().flat_map(|layer| &layer.input_squares);
        let n_sequences = report.calibration.as_ref().map_or(0, |c| c.n_sequences);
        let prefix = self.model.decoder_prefix();
        let bytes = imatrix_file(prefix, squares, "calibration", n_sequences)?;
        self.exporter.write_file(IMATRIX_FILE, &bytes)
    }

    /// Adds report and card, and gives the output its name.
    pub(super) fn finish(
        mut self,
        plan: &[ModulePlan],
        format: Format,
        report: &mut RunReport,
        output: &Path,
    ) -> Result<Exported> {
        let folder = folder_name(output);
        report.output = Some(OutputReport {
            format: format.name().into(),
            tensor_bytes: self.exporter.tensor_bytes(),
        });
        let (name, bytes) = report.to_file();
        self.exporter.write_file(&name, &bytes)?;
        if let Some(pictures) = self.pictures.take() {
            let importance = pictures.into_file();
            let page = Page::new(&folder, report, importance.as_ref());
            self.exporter
                .write_file(PAGE_FILE, page.html().as_bytes())?;
            if let Some((name, bytes)) = importance.map(|file| file.to_file()) {
                self.exporter.write_file(&name, &bytes)?;
            }
        }
        write_card(&self.exporter, self.model, plan, format, report, output)?;
        let mut exported = self.exporter.finish()?;
        if format == Format::Gguf {
            exported.tensor_bytes = write_gguf(&self.journal, output)?;
            let written = report.output.as_mut();
            written
                .into_iter()
                .for_each(|w| w.tensor_bytes = exported.tensor_bytes);
        }
        self.journal.discard()?;
        Ok(exported)
    }

    /// The file of the layer at work.
    fn layer_writer(&mut self, layer_idx: usize) -> Result<&mut LayerWriter> {
        match &mut self.layer {
            Some(layer) => Ok(layer),
            none => {
                let path = self.journal.layer_path(layer_idx);
                Ok(none.insert(LayerWriter::create(path)?))
            }
        }
    }
}

impl LayerSink for Journaled<'_> {
    fn finished(&mut self, layer_idx: usize) -> Result<Option<FinishedLayer>> {
        let digest = || self.model.layer_digest(layer_idx);
        let Some(layer) = self.journal.finished(layer_idx, digest)? else {
            return Ok(None);
        };
        let modules = self.model.layer_modules(layer_idx);
        for (name, weight) in &layer.weights {
            let module = modules.iter().find(|module| module.name == *name);
            let module = module.ok_or_else(|| Error::Missing {
                what: name.clone(),
                place: format!("layer {layer_idx} of the model"),
            })?;
            self.export(module, weight)?;
        }
        for (name, values) in &layer.tensors {
            self.exporter.write_tensor(name, values)?;
        }
        Ok(Some(layer))
    }

    fn kept_samples(&self) -> Option<Vec<usize>> {
        let pictures = self.pictures.as_ref()?;
        Some(pictures.kept.clone())
    }

    fn module(&mut self, module: &Module, weight: &QuantizedWeight) -> Result<()> {
        let layer = self.layer_writer(module.layer_idx)?;
        layer.module(&module.name, weight)?;
        self.export(module, weight)
    }

    fn tensor(&mut self, tensor: &ChangedTensor) -> Result<()> {
        let layer = self.layer_writer(tensor.layer_idx)?;
        layer.tensor(&tensor.name, &tensor.values);
        self.exporter.write_tensor(&tensor.name, &tensor.values)
    }

    fn layer(&mut self, layer_idx: usize, outcome: &LayerOutcome) -> Result<()> {
        let path = self.journal.layer_path(layer_idx);
        let layer = self.layer.take();
        let layer = layer.map_or_else(|| LayerWriter::create(path), Ok)?;
        layer.finish(layer_idx, &self.model.layer_digest(layer_idx)?, outcome)
    }
}

/// Turns the finished folder of codes in the journal into the output; returns the bytes of tensors.
fn write_gguf(journal: &Journal, output: &Path) -> Result<u64> {
    let codes = Checkpoint::open(&journal.codes())?;
    let model = open_model(codes, Device::Cpu)?;
    let written = export_gguf(&model, output, None)?;
    let files = [Some(written.model), written.mmproj];
    Ok(files.iter().flatten().map(|file| file.tensor_bytes).sum())
}

/// The card of the output, beside that of the model it is made of.
fn write_card(
    exporter: &Exporter,
    model: &ModelSource,
    plan: &[ModulePlan],
    format: Format,
    report: &RunReport,
    output: &Path,
) -> Result<()> {
    let card = Card {
        name: &folder_name(output),
        source: model.checkpoint(),
        decoder: model.decoder(),
        plan,
        format,
        report: Some(report),
        evaluation: None,
    };
    exporter.write_file(CARD_FILE, card.text().as_bytes())?;
    match base_card(model.checkpoint(), false)? {
        Some((name, bytes)) => exporter.write_file(&name, &bytes),
        None => Ok(()),
    }
}

/// The output folder in the making, in the journal's hands.
pub(super) fn open_exporter<'a>(
    model: &'a ModelSource,
    plan: &[ModulePlan],
    journal: &Journal,
    format: Format,
) -> Result<Exporter<'a>> {
    let pending = match format == format.folder() {
        true => journal.pending()?,
        false => journal.pending_codes()?,
    };
    let format = format.folder();
    Exporter::create(model.checkpoint(), format, plan, pending, MAX_SHARD_BYTES)
}
