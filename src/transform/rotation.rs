//! The residual stream of a model turned by an orthogonal matrix Q, in a new folder of the same
//! form: no channel of it stands out any more, and the model computes what it did.
//!
//! With norms that have no weight of their own, x ↦ x·Q goes through a layer unseen:
//! ```text
//! norms              γ ← 1, after it went into the linears behind:
//! q k v gate up head W ← W·diag(γ)·Q        read the stream
//! o down             W ← Qᵀ·W, b ← b·Q      write to it
//! embeddings         E ← E·Q
//! vision tower       what writes its rows into the prompt, as o and down
//! ```
//! A head that is the embedding gets a tensor of its own, and the configuration says so. All is
//! computed in f64 and rounded once, to the source's types, or to f32.
//!
//! Exact for pre-norm decoders with RMS norms. Refused by name: norms after attention and MLP,
//! which have weights of their own between the linears and the stream; mixtures of experts, whose
//! routers and fused tensors are not turned; towers whose outputs are not known by name.
//!
//! Source: arXiv:2404.00456 (QuaRot) §4, without its online rotations. Differs: embeddings keep
//! their mean, which an RMS norm does not take away.

use super::orthogonal::{Rotation, RotationKind};
use crate::checkpoint::write::{MAX_SHARD_BYTES, ShardedWriter, TensorSpec};
use crate::checkpoint::{CONFIG_FILE, Checkpoint, DType, PendingFolder};
use crate::export::copy_side_files;
use crate::families;
use crate::model::changed::LayerPart;
use crate::model::decoder_config::NormScale;
use crate::model::projection::Projection;
use crate::model::vision::VisionOutput;
use crate::model::{ModelSource, Module};
use crate::{Error, Result};
use candle_core::Device;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Rows of a tensor that are turned together.
const ROWS_AT_ONCE: usize = 1024;

/// How a model is turned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RotationSettings {
    /// How Q is made.
    pub kind: RotationKind,
    /// Of its random numbers.
    pub seed: u64,
    /// Whether turned tensors are written in f32, whatever the source's type is.
    pub in_f32: bool,
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotated {
    /// Tensors with other values than the source's, a head of its own among them.
    pub n_changed: usize,
    /// Tensors copied unchanged.
    pub n_copied: usize,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
}

/// What becomes of a tensor.
#[derive(Clone, Debug)]
enum Change {
    /// Each row is multiplied by diag(γ) and Q.
    Rows(Option<Arc<Vec<f64>>>),
    /// Each column is multiplied by Qᵀ.
    Columns,
    /// All values are this one.
    Constant(f32),
}

/// A tensor of the output: of which tensor of the source it is made, and how.
struct Plan {
    from: String,
    change: Change,
}

/// Writes `model` with its residual stream turned into the new folder `output`.
///
/// # Errors
/// [`Error::Unsupported`] for a model whose function would not be kept, that is quantized, or whose
/// tensors are not bf16, f16 or f32; [`Error::NotFinite`]; [`Error::Exists`] if `output` is there
/// already; [`Error::Io`]. Nothing is left behind then.
pub fn rotate_folder(
    model: &ModelSource,
    settings: RotationSettings,
    output: &Path,
) -> Result<Rotated> {
    refuse(model)?;
    let source = model.checkpoint();
    let plans = plans(model)?;
    let pending = PendingFolder::create(output)?;
    let specs = specs(source, &plans, settings.in_f32)?;
    let mut writer = ShardedWriter::create(pending.path(), specs.clone(), MAX_SHARD_BYTES)?;
    let hidden = model.decoder().hidden_size;
    let work = Work {
        source,
        rotation: Rotation::new(settings.kind, hidden, settings.seed),
    };
    for spec in &specs {
        match plans.get(&spec.name) {
            Some(plan) => writer.write_pieces(&spec.name, work.pieces(plan, spec.dtype)?)?,
            None if writer.is_open(&spec.name) => {
                writer.write_pieces(&spec.name, source.pieces(&spec.name)?)?;
            }
            None => {}
        }
    }
    let tensor_bytes = writer.finish()?;
    pending.write_file(CONFIG_FILE, untied_config(model)?.as_bytes())?;
    copy_side_files(source, &pending)?;
    // Read as any model would be, which looks at every shape, before it gets its name.
    let written = Checkpoint::open(pending.path())?;
    families::open_model(written, Device::Cpu)?.load_head()?;
    pending.commit()?;
    Ok(Rotated {
        n_changed: plans.len(),
        n_copied: specs.len() - plans.len(),
        tensor_bytes,
    })
}

/// # Errors
/// [`Error::Unsupported`], saying what in the model does not go with a turned stream.
fn refuse(model: &ModelSource) -> Result<()> {
    let family = model.family();
    let decoder = model.decoder();
    let why = if model.checkpoint().quantization().is_some() {
        "its weights are quantized already"
    } else if decoder.sandwich_norms {
        "norms after attention and MLP have weights between the linears and the residual stream"
    } else if decoder.experts.is_some() {
        "routers and fused tensors of mixtures of experts are not turned"
    } else if model.vision().outputs().is_empty() {
        "what its vision tower writes into the prompt is not known by name"
    } else {
        return Ok(());
    };
    Err(Error::Unsupported {
        what: format!("rotation of {family}: {why}"),
    })
}

/// Every tensor that is not copied.
fn plans(model: &ModelSource) -> Result<BTreeMap<String, Plan>> {
    let mut plans = BTreeMap::new();
    let names = model.names();
    let embedding = format!("{}.embed_tokens.weight", names.decoder);
    let final_norm = format!("{}.norm.weight", names.decoder);
    let gamma = gamma(model, &final_norm)?;
    let head_from = match model.decoder().tie_word_embeddings {
        true => &embedding,
        false => &names.head,
    };
    add(
        &mut plans,
        &names.head,
        head_from,
        Change::Rows(Some(gamma)),
    );
    put(&mut plans, &embedding, Change::Rows(None));
    put(&mut plans, &final_norm, ones(model));
    for layer_idx in 0..model.decoder().n_layers {
        plan_layer(model, layer_idx, &mut plans)?;
    }
    for output in model.vision().outputs() {
        match output {
            VisionOutput::Linear(module) => plan_writer(model, &module, &mut plans),
            VisionOutput::Row(name) => put(&mut plans, &name, Change::Rows(None)),
        }
    }
    Ok(plans)
}

fn plan_layer(
    model: &ModelSource,
    layer_idx: usize,
    plans: &mut BTreeMap<String, Plan>,
) -> Result<()> {
    let source = model.layer_source(layer_idx);
    let [attention, mlp] = [LayerPart::BeforeAttention, LayerPart::BeforeMlp];
    let norms = [attention, mlp].map(|part| source.part_name(part));
    let gammas = [gamma(model, &norms[0])?, gamma(model, &norms[1])?];
    for name in &norms {
        put(plans, name, ones(model));
    }
    for Module { slot, name, .. } in model.layer_modules(layer_idx) {
        let gamma = match slot.projection {
            Projection::Q | Projection::K | Projection::V => &gammas[0],
            Projection::Gate | Projection::Up => &gammas[1],
            Projection::O | Projection::Down => {
                plan_writer(model, &name, plans);
                continue;
            }
        };
        let change = Change::Rows(Some(gamma.clone()));
        put(plans, &format!("{name}.weight"), change);
    }
    Ok(())
}

/// A linear that writes to the stream, with its bias where it has one.
fn plan_writer(model: &ModelSource, module: &str, plans: &mut BTreeMap<String, Plan>) {
    put(plans, &format!("{module}.weight"), Change::Columns);
    let bias = format!("{module}.bias");
    if model.checkpoint().contains(&bias) {
        put(plans, &bias, Change::Rows(None));
    }
}

fn put(plans: &mut BTreeMap<String, Plan>, name: &str, change: Change) {
    add(plans, name, name, change);
}

fn add(plans: &mut BTreeMap<String, Plan>, name: &str, from: &str, change: Change) {
    let from = from.to_owned();
    plans.insert(name.to_owned(), Plan { from, change });
}

/// What a norm multiplies by.
fn gamma(model: &ModelSource, name: &str) -> Result<Arc<Vec<f64>>> {
    let weight = model
        .checkpoint()
        .load(name, &[model.decoder().hidden_size])?;
    let offset = 1.0 - f64::from(unit(model));
    Ok(Arc::new(
        weight.iter().map(|w| f64::from(*w) + offset).collect(),
    ))
}

fn ones(model: &ModelSource) -> Change {
    Change::Constant(unit(model))
}

/// The weight of a norm that multiplies by one.
fn unit(model: &ModelSource) -> f32 {
    match model.decoder().norm_scale {
        NormScale::Weight => 1.0,
        NormScale::OnePlusWeight => 0.0,
    }
}

/// Every tensor of the output.
fn specs(
    source: &Checkpoint,
    plans: &BTreeMap<String, Plan>,
    in_f32: bool,
) -> Result<Vec<TensorSpec>> {
    let mut specs = Vec::new();
    let added = plans.keys().map(String::as_str);
    let added = added.filter(|name| !source.contains(name));
    for name in source.names().chain(added) {
        let plan = plans.get(name);
        let from = plan.map_or(name, |plan| &plan.from);
        let info = source.info(from).ok_or_else(|| Error::Missing {
            what: format!("tensor {from}"),
            place: source.dir().display().to_string(),
        })?;
        if plan.is_some() && info.dtype.bytes_from_f32(&[]).is_none() {
            let what = format!("rotation of {from}, stored as {}", info.dtype.name());
            return Err(Error::Unsupported { what });
        }
        specs.push(TensorSpec {
            name: name.to_owned(),
            dtype: match plan.is_some() && in_f32 {
                true => DType::F32,
                false => info.dtype,
            },
            shape: info.shape.clone(),
        });
    }
    Ok(specs)
}

struct Work<'a> {
    source: &'a Checkpoint,
    rotation: Rotation,
}

impl Work<'_> {
    /// The bytes of a tensor of the output, some rows at a time.
    fn pieces<'a>(
        &'a self,
        plan: &'a Plan,
        dtype: DType,
    ) -> Result<Box<dyn Iterator<Item = Result<Vec<u8>>> + 'a>> {
        let shape = self.source.info(&plan.from).map(|info| &info.shape[..]);
        let shape = shape.unwrap_or_default();
        let n_values: usize = shape.iter().product();
        let encode = move |values: Vec<f32>| {
            dtype
                .bytes_from_f32(&values)
                .ok_or_else(|| Error::Unsupported {
                    what: format!("{}: turned values in {}", plan.from, dtype.name()),
                })
        };
        match &plan.change {
            Change::Constant(value) => {
                let values = vec![*value; n_values];
                Ok(Box::new(std::iter::once_with(move || encode(values))))
            }
            Change::Rows(gamma) => {
                self.check_width(&plan.from, shape.last(), shape)?;
                let n_rows = n_values / self.rotation.order();
                let starts = (0..n_rows).step_by(ROWS_AT_ONCE);
                let ranges = starts.map(move |start| start..n_rows.min(start + ROWS_AT_ONCE));
                let gamma = gamma.as_ref().map(|g| &g[..]);
                Ok(Box::new(ranges.map(move |rows| {
                    encode(self.turned_rows(&plan.from, rows, gamma)?)
                })))
            }
            Change::Columns => {
                self.check_width(&plan.from, shape.first(), shape)?;
                let values = self.turned_columns(&plan.from, shape)?;
                Ok(Box::new(std::iter::once_with(move || encode(values))))
            }
        }
    }

    fn check_width(&self, name: &str, found: Option<&usize>, shape: &[usize]) -> Result<()> {
        match found == Some(&self.rotation.order()) {
            true => Ok(()),
            false => Err(Error::Shape {
                module: format!("{name}, one side of which is the residual stream's"),
                expected: vec![self.rotation.order()],
                found: shape.to_vec(),
            }),
        }
    }

    fn turned_rows(
        &self,
        name: &str,
        rows: Range<usize>,
        gamma: Option<&[f64]>,
    ) -> Result<Vec<f32>> {
        let n = self.rotation.order();
        let dtype = self.source.info(name).map_or(DType::F32, |info| info.dtype);
        let row_bytes = n * dtype.n_bytes();
        let range = rows.start * row_bytes..rows.end * row_bytes;
        let bytes = self.source.bytes_at(name, range)?.unwrap_or_default();
        let values = dtype.f32_from_bytes(&bytes).unwrap_or_default();
        let count = values.iter().filter(|v| !v.is_finite()).count();
        if count > 0 {
            return Err(Error::NotFinite {
                module: name.to_owned(),
                stage: "weights".into(),
                count,
            });
        }
        let mut turned: Vec<f64> = values.into_iter().map(f64::from).collect();
        if let Some(gamma) = gamma {
            for row in turned.chunks_exact_mut(n) {
                row.iter_mut().zip(gamma).for_each(|(x, g)| *x *= g);
            }
        }
        self.rotation.apply(&mut turned);
        Ok(turned.into_iter().map(|x| x as f32).collect())
    }

    /// Qᵀ·W is (Wᵀ·Q)ᵀ.
    fn turned_columns(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let values = self.source.load(name, shape)?;
        let n = self.rotation.order();
        let width = values.len() / n.max(1);
        let mut columns = vec![0.0f64; values.len()];
        for (row, values) in values.chunks_exact(width.max(1)).enumerate() {
            for (col, value) in values.iter().enumerate() {
                columns[col * n + row] = f64::from(*value);
            }
        }
        self.rotation.apply(&mut columns);
        let value = |i: usize| columns[(i % width) * n + i / width] as f32;
        Ok((0..columns.len()).map(value).collect())
    }
}

/// `config.json` of a model whose head is its own.
fn untied_config(model: &ModelSource) -> Result<String> {
    const KEY: &str = "tie_word_embeddings";
    let source = model.checkpoint();
    if !model.decoder().tie_word_embeddings {
        return Ok(source.config_text().to_owned());
    }
    let mut config = source.config().clone();
    let path = source.dir().join(CONFIG_FILE);
    let invalid = || Error::format(&path, "JSON", "expected an object");
    let root = config.as_object_mut().ok_or_else(invalid)?;
    root.insert(KEY.into(), false.into());
    for part in ["text_config", "llm_config"] {
        if let Some(text) = root.get_mut(part).and_then(|part| part.as_object_mut()) {
            text.insert(KEY.into(), false.into());
        }
    }
    Ok(format!("{config:#}\n"))
}
