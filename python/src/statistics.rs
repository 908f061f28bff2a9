//! What a calibration pass sums up, group by group, as arrays of numpy.

use crate::array::array;
use crate::error;
use crate::job::{Cancel, Job};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Mutex, PoisonError};
use vlmq::calibration::CalibrationSet;
use vlmq::checkpoint::Checkpoint;
use vlmq::dataset::open_samples;
use vlmq::families::open_model;
use vlmq::model::{ChangedTensor, Module};
use vlmq::pipeline::{self, GroupStatistics, LayerSink, Observer};
use vlmq::plan::{Bits, ScaleDtype, Scheme};
use vlmq::recipe::Recipe;
use vlmq::run::{SampleChoice, load_samples};
use vlmq::{Error, Matrix, QuantizedWeight, Result};

/// What is asked for.
struct Asked {
    model: PathBuf,
    calibration: PathBuf,
    method: String,
    bits: Bits,
    group_size: Option<usize>,
    symmetric: bool,
    settings: Vec<String>,
    samples: usize,
    seed: u64,
    max_tokens: usize,
    /// All layers if absent.
    layers: Option<Vec<usize>>,
}

/// One thing that the pass tells.
enum Told {
    Samples(Vec<Sample>),
    Group(Box<Group>),
}

struct Sample {
    origin: String,
    input_ids: Vec<u32>,
    classes: Vec<&'static str>,
}

/// As [`GroupStatistics`], owned.
struct Group {
    layer: usize,
    modules: Vec<String>,
    n_tokens: u64,
    effective_sample_size: f64,
    hessian: Matrix,
    cross: Option<Matrix>,
    output_cross: Option<Matrix>,
    weights: Option<Vec<Vec<f32>>>,
    factors: Option<Vec<Vec<f32>>>,
}

/// Begins a calibration pass, whose groups of linears the result gives one by one.
#[pyfunction]
#[pyo3(signature = (*, model, calibration, method, bits, group_size, symmetric, settings, samples,
    seed, max_tokens, layers))]
#[expect(
    clippy::too_many_arguments,
    reason = "each has its name on Python's side"
)]
pub fn statistics(
    py: Python<'_>,
    model: PathBuf,
    calibration: PathBuf,
    method: String,
    bits: &str,
    group_size: Option<usize>,
    symmetric: bool,
    settings: Vec<String>,
    samples: usize,
    seed: u64,
    max_tokens: usize,
    layers: Option<Vec<usize>>,
) -> PyResult<Groups> {
    let bits = bits.parse().map_err(|e| error::of_library(py, &e))?;
    let asked = Asked {
        model,
        calibration,
        method,
        bits,
        group_size,
        symmetric,
        settings,
        samples,
        seed,
        max_tokens,
        layers,
    };
    // One group is on its way at a time: each may be gigabytes.
    let (sender, told) = mpsc::sync_channel(0);
    let cancel = Cancel::default();
    let ear = Ear {
        sender: Mutex::new(sender),
        cancel: cancel.clone(),
        layers: asked.layers.clone(),
    };
    let job = Job::start(told, cancel, move || pass(&asked, &ear))?;
    Ok(Groups { job, samples: None })
}

/// The pass over the model; ends after the last layer that is asked for.
fn pass(asked: &Asked, ear: &Ear) -> Result<()> {
    let checkpoint = Checkpoint::open(&asked.model)?;
    let model = open_model(checkpoint, candle_core::Device::Cpu)?;
    let n_layers = model.decoder().n_layers;
    let wanted = asked.layers.iter().flatten();
    if let Some(layer) = wanted.copied().find(|layer| *layer >= n_layers) {
        return Err(Error::Invalid {
            what: format!("layers: {layer}"),
            why: format!("0 to {} expected", n_layers - 1),
        });
    }
    let scheme = Scheme::new(
        asked.bits.ceil(),
        asked.group_size,
        asked.symmetric,
        ScaleDtype::F32,
    )?;
    let mut recipe = Recipe::new(asked.method.parse()?, scheme);
    for assignment in &asked.settings {
        recipe.set(assignment)?;
    }
    if !recipe.needs_calibration() || recipe.method.is_scaled() {
        return Err(Error::Invalid {
            what: format!("method {}", asked.method),
            why: "it keeps no statistics of inputs; gptq, gptaq, qronos and vlmq do".into(),
        });
    }
    let choice = SampleChoice {
        set: open_samples(&asked.calibration)?,
        n_samples: asked.samples,
        seed: asked.seed,
        max_tokens: asked.max_tokens,
    };
    let in_memory = std::env::temp_dir();
    let set = load_samples(&model, &recipe, Some(&choice), u64::MAX, &in_memory, ear)?;
    ear.tell(Told::Samples(samples_of(&set)));
    pipeline::quantize(&model, set, &recipe, ear, &mut Nowhere).map(drop)
}

fn samples_of(set: &CalibrationSet) -> Vec<Sample> {
    let sample = |sample: &vlmq::calibration::CalibrationSample| Sample {
        origin: sample.origin.clone(),
        input_ids: sample.input_ids.clone(),
        classes: sample.classes.iter().map(|class| class.name()).collect(),
    };
    set.samples.iter().map(sample).collect()
}

/// Takes what the pass tells to whoever waits for it.
struct Ear {
    sender: Mutex<SyncSender<Told>>,
    cancel: Cancel,
    layers: Option<Vec<usize>>,
}

impl Ear {
    fn tell(&self, told: Told) {
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        if sender.send(told).is_err() {
            self.cancel.ask();
        }
    }

    fn wants(&self, layer_idx: usize) -> bool {
        let layers = self.layers.as_ref();
        layers.is_none_or(|layers| layers.contains(&layer_idx))
    }
}

impl Observer for Ear {
    fn on_layer(&self, layer_idx: usize, _n_layers: usize) {
        let layers = self.layers.as_ref();
        if layers.is_some_and(|layers| layers.iter().all(|layer| *layer < layer_idx)) {
            self.cancel.ask();
        }
    }

    fn on_statistics(&self, found: &GroupStatistics<'_>) {
        if !self.wants(found.layer_idx) || self.cancel.is_asked() {
            return;
        }
        self.tell(Told::Group(Box::new(Group {
            layer: found.layer_idx,
            modules: found.modules.iter().map(|m| m.name.clone()).collect(),
            n_tokens: found.statistics.n_tokens(),
            effective_sample_size: found.statistics.effective_sample_size(),
            hessian: found.statistics.hessian(),
            cross: found.statistics.cross().cloned(),
            output_cross: found.statistics.output_cross().cloned(),
            weights: found.weights.map(<[_]>::to_vec),
            factors: found.factors.map(<[_]>::to_vec),
        })));
    }

    fn is_cancelled(&self) -> bool {
        self.cancel.is_asked()
    }
}

/// Weights are solved, since the next layer sees what they give, and let go.
struct Nowhere;

impl LayerSink for Nowhere {
    fn module(&mut self, _: &Module, _: &QuantizedWeight) -> Result<()> {
        Ok(())
    }

    fn tensor(&mut self, _: &ChangedTensor) -> Result<()> {
        Ok(())
    }
}

/// The groups of a pass, one after the other.
#[pyclass]
pub struct Groups {
    job: Job<Told, Result<()>>,
    /// The samples, once they are known.
    samples: Option<Vec<Sample>>,
}

#[pymethods]
impl Groups {
    fn __iter__(this: PyRef<'_, Self>) -> PyRef<'_, Self> {
        this
    }

    fn __next__<'py>(&mut self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        match self.told(py)? {
            Some(group) => Ok(Some(group.into_dict(py)?)),
            None => Ok(None),
        }
    }

    /// The samples that the pass is over, (origin, token ids, classes) each; waits until they are
    /// read.
    fn samples<'py>(&mut self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        if self.samples.is_none() {
            self.first(py)?;
        }
        let samples = self.samples.iter().flatten();
        samples.map(|sample| sample.to_dict(py)).collect()
    }

    /// Ends the pass.
    fn close(&mut self, py: Python<'_>) -> PyResult<()> {
        self.job.cancel();
        self.job.join(py).map(drop)
    }
}

impl Groups {
    /// The samples, which come before anything else.
    fn first(&mut self, py: Python<'_>) -> PyResult<()> {
        match self.job.next(py)? {
            Some(Told::Samples(samples)) => self.samples = Some(samples),
            Some(Told::Group(_)) => {}
            None => self.end(py)?,
        }
        Ok(())
    }

    fn told(&mut self, py: Python<'_>) -> PyResult<Option<Box<Group>>> {
        if self.samples.is_none() {
            self.first(py)?;
        }
        match self.job.next(py)? {
            Some(Told::Group(group)) => Ok(Some(group)),
            Some(Told::Samples(_)) => Ok(None),
            None => self.end(py).map(|()| None),
        }
    }

    /// What the pass ended with; that it was ended after the last layer asked for is no error.
    fn end(&mut self, py: Python<'_>) -> PyResult<()> {
        match self.job.join(py)? {
            Some(Err(error)) if !matches!(error, Error::Interrupted) => {
                Err(error::of_library(py, &error))
            }
            _ => Ok(()),
        }
    }
}

impl Sample {
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        dict.set_item("origin", &self.origin)?;
        dict.set_item(
            "input_ids",
            array(py, &[self.input_ids.len()], &self.input_ids)?,
        )?;
        dict.set_item("classes", &self.classes)?;
        Ok(dict)
    }
}

impl Group {
    fn into_dict<'py>(self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        dict.set_item("layer", self.layer)?;
        dict.set_item("modules", self.modules)?;
        dict.set_item("n_tokens", self.n_tokens)?;
        dict.set_item("effective_sample_size", self.effective_sample_size)?;
        dict.set_item("hessian", matrix(py, self.hessian)?)?;
        let cross = self.cross.map(|cross| matrix(py, cross)).transpose()?;
        dict.set_item("cross", cross)?;
        let output_cross = self
            .output_cross
            .map(|cross| matrix(py, cross))
            .transpose()?;
        dict.set_item("output_cross", output_cross)?;
        let weights = self.weights.map(|rows| rows_of(py, rows)).transpose()?;
        dict.set_item("weights", weights)?;
        let factors = self.factors.map(|rows| rows_of(py, rows)).transpose()?;
        dict.set_item("factors", factors)?;
        Ok(dict)
    }
}

fn matrix(py: Python<'_>, matrix: Matrix) -> PyResult<Bound<'_, PyAny>> {
    array(py, &[matrix.rows(), matrix.cols()], matrix.data())
}

fn rows_of(py: Python<'_>, rows: Vec<Vec<f32>>) -> PyResult<Vec<Bound<'_, PyAny>>> {
    let rows = rows.iter();
    rows.map(|row| array(py, &[row.len()], row)).collect()
}
