//! Statistics on disk: made by `vlmq calibrate`, in shards if need be, added up by `vlmq merge`, and
//! solved from by `vlmq quantize --statistics`, as often as one likes and without samples.
//!
//! ```text
//! vlmq_statistics.json         what they are of: model, samples, weights of tokens; every group's counts
//! layer-00000.safetensors …    NAME.hessian_lower   H's lower triangle row after row, f32
//! ```
//! NAME is the first of the linears that see the same inputs with the same token weights. A shard's
//! weights are relative to its own mean factor; where shards are added up, each counts by that mean,
//! (ḡ_shard / ḡ)^p, so that the sum is what all samples together would have given, up to rounding.

use super::Statistics;
use super::bands::Counts;
use crate::checkpoint::{DType, PendingFolder, Shard};
use crate::{Error, Result};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Name of the table of contents.
pub const STATISTICS_FILE: &str = "vlmq_statistics.json";

/// Version of the table of contents.
const SCHEMA: u32 = 1;

/// Largest table of contents that is read: thousands of experts have one of a few megabytes.
const MAX_INDEX_BYTES: u64 = 256 << 20;

/// What statistics are of: those of two shards can be added up if all of this is the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// Version of vlmq.
    pub vlmq: String,
    /// How tokens are weighed; null where they weigh alike.
    pub importance: Value,
    /// Digest of which samples were chosen.
    pub samples: String,
    /// How many samples were chosen, of all shards.
    pub n_samples: usize,
    /// Into how many shards they were cut.
    pub n_shards: usize,
}

/// What a folder holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Index {
    schema: u32,
    origin: Origin,
    /// The power of factors that weights are.
    power: f64,
    /// Which shards are in it, from 0.
    shards: BTreeSet<usize>,
    layers: Vec<Layer>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Layer {
    /// Digest of its weights in the model.
    source: String,
    groups: Vec<Group>,
}

/// Linears with the same statistics.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Group {
    /// By checkpoint name.
    pub modules: Vec<String>,
    in_features: usize,
    counts: Counts,
    mean_factor: Option<MeanFactor>,
}

/// ḡ, and how many tokens it is the mean of.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct MeanFactor {
    mean: f64,
    n_tokens: usize,
}

impl MeanFactor {
    /// Of g, `[sample][token]`.
    pub(crate) fn of(factors: &[Vec<f32>]) -> Self {
        let n_tokens = factors.iter().map(Vec::len).sum();
        let sum: f64 = factors.iter().flatten().map(|g| f64::from(*g)).sum();
        Self {
            mean: sum / (n_tokens as f64).max(1.0),
            n_tokens,
        }
    }

    fn merge(&mut self, other: Self) {
        let n_tokens = self.n_tokens + other.n_tokens;
        let sum = self.mean * self.n_tokens as f64 + other.mean * other.n_tokens as f64;
        self.mean = sum / (n_tokens as f64).max(1.0);
        self.n_tokens = n_tokens;
    }
}

/// A folder of statistics.
#[derive(Debug)]
pub struct StatisticsFolder {
    dir: PathBuf,
    index: Index,
}

impl StatisticsFolder {
    /// Opens a folder and checks its table of contents.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] if it is damaged or of another version.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(STATISTICS_FILE);
        let read = |e| Error::io(&path, "read", e);
        if std::fs::metadata(&path).map_err(read)?.len() > MAX_INDEX_BYTES {
            return Err(Error::format(&path, "size", "larger than any of ours"));
        }
        let bytes = std::fs::read(&path).map_err(read)?;
        let index = serde_json::from_slice(&bytes);
        let index: Index = index.map_err(|e| Error::format(&path, "JSON", e.to_string()))?;
        let wrong = |at: &str, why: String| Err(Error::format(&path, at, why));
        if index.schema != SCHEMA {
            return wrong(
                "schema",
                format!("{SCHEMA} expected, found {}", index.schema),
            );
        }
        let n_shards = index.origin.n_shards;
        if index.shards.is_empty() || index.shards.iter().any(|shard| *shard >= n_shards) {
            return wrong("shards", format!("some of {n_shards} expected"));
        }
        let is_empty = |group: &Group| group.modules.is_empty() || group.in_features == 0;
        if index.layers.iter().flat_map(|l| &l.groups).any(is_empty) {
            return wrong("groups", "a group without linears or columns".into());
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            index,
        })
    }

    /// What the statistics are of.
    pub fn origin(&self) -> &Origin {
        &self.index.origin
    }

    /// Shards that are not in it, from 0.
    pub fn missing_shards(&self) -> Vec<usize> {
        let all = 0..self.index.origin.n_shards;
        all.filter(|shard| !self.index.shards.contains(shard))
            .collect()
    }

    /// Number of layers.
    pub fn n_layers(&self) -> usize {
        self.index.layers.len()
    }

    /// Digest of the weights of a layer that the statistics were made with.
    pub fn layer_source(&self, layer_idx: usize) -> Option<&str> {
        let layer = self.index.layers.get(layer_idx)?;
        Some(&layer.source)
    }

    /// The groups of a layer.
    pub fn groups(&self, layer_idx: usize) -> &[Group] {
        let layer = self.index.layers.get(layer_idx);
        layer.map_or(&[], |layer| &layer.groups)
    }

    /// A digest of all of it but the moments, which its file's sizes answer for.
    pub fn digest(&self) -> String {
        let bytes = serde_json::to_vec(&self.index).expect("an index has only text keys");
        blake3::hash(&bytes).to_string()
    }

    /// The statistics of each group of a layer in turn.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] if the file is damaged, [`Error::Missing`] if it has not
    /// what the table of contents tells.
    pub fn layer(&self, layer_idx: usize) -> Result<impl Iterator<Item = Result<Statistics>>> {
        let path = self.dir.join(layer_file(layer_idx));
        let shard = Shard::open(&path)?;
        let groups = self.groups(layer_idx).iter();
        Ok(groups.map(move |group| group.read(&shard, &path)))
    }
}

impl Group {
    fn tensor(&self) -> String {
        format!("{}.hessian_lower", self.modules[0])
    }

    fn read(&self, shard: &Shard, path: &Path) -> Result<Statistics> {
        let name = self.tensor();
        let entry = shard.tensors.get(&name).ok_or_else(|| Error::Missing {
            what: name.clone(),
            place: path.display().to_string(),
        })?;
        let n = self.in_features;
        let expected = n
            .checked_add(1)
            .and_then(|next| next.checked_mul(n))
            .map(|twice| twice / 2);
        if entry.dtype != DType::F32
            || Some(&entry.shape[..]) != expected.as_ref().map(std::slice::from_ref)
        {
            let why = format!("F32 [{}] expected", expected.unwrap_or(usize::MAX));
            return Err(Error::format(path, name, why));
        }
        let bytes = shard.read(entry.range.clone())?;
        let (words, _) = bytes.as_chunks::<4>();
        let values = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
        Statistics::new(n, false).filled(self.counts, &[values])
    }
}

fn layer_file(layer_idx: usize) -> String {
    format!("layer-{layer_idx:05}.safetensors")
}

/// A folder of statistics in the making; it appears complete or not at all.
pub(crate) struct StatisticsWriter {
    pending: PendingFolder,
    index: Index,
    /// Of the layer at work.
    groups: Vec<Group>,
    moments: BTreeMap<String, Vec<u8>>,
}

impl StatisticsWriter {
    /// Begins a folder for some shards of what `origin` tells, with weights that are factors to a
    /// `power`.
    ///
    /// # Errors
    /// Those of [`PendingFolder::create`].
    pub(crate) fn create(
        output: &Path,
        origin: Origin,
        power: f64,
        shards: BTreeSet<usize>,
    ) -> Result<Self> {
        let index = Index {
            schema: SCHEMA,
            origin,
            power,
            shards,
            layers: Vec::new(),
        };
        Ok(Self {
            pending: PendingFolder::create(output)?,
            index,
            groups: Vec::new(),
            moments: BTreeMap::new(),
        })
    }

    /// Where else files for the time of the work may lie.
    pub(crate) fn dir(&self) -> &Path {
        self.pending.path()
    }

    /// Adds a group to the layer at work.
    pub(crate) fn add(
        &mut self,
        modules: Vec<String>,
        statistics: &Statistics,
        mean_factor: Option<MeanFactor>,
    ) {
        let group = Group {
            modules,
            in_features: statistics.in_features(),
            counts: statistics.counts(),
            mean_factor,
        };
        let moments = statistics.band(0, 1);
        let bytes = moments.iter().flat_map(|value| value.to_le_bytes());
        self.moments.insert(group.tensor(), bytes.collect());
        self.groups.push(group);
    }

    /// Ends the layer at work, whose weights have this digest.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn end_layer(&mut self, source: String) -> Result<()> {
        let path = self.dir().join(layer_file(self.index.layers.len()));
        let moments = std::mem::take(&mut self.moments);
        let views = moments.iter().map(|(name, bytes)| {
            let view = TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes);
            (name, view.expect("the length is that of the bytes"))
        });
        serialize_to_file(views, None, &path).map_err(|e| match e {
            safetensors::SafeTensorError::IoError(e) => Error::io(&path, "write", e),
            other => Error::format(&path, "tensors", other.to_string()),
        })?;
        let groups = std::mem::take(&mut self.groups);
        self.index.layers.push(Layer { source, groups });
        Ok(())
    }

    /// Gives the folder its name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn finish(self) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(&self.index).expect("an index has only text keys");
        self.pending.write_file(STATISTICS_FILE, &bytes)?;
        self.pending.commit()
    }
}

/// Adds up folders of other shards each into a new one, and gives the shards that are still missing.
///
/// # Errors
/// [`Error::Invalid`] if they are not of the same model, samples and settings, or have a shard in
/// common; those of reading and writing.
pub fn merge_folders(dirs: &[PathBuf], output: &Path) -> Result<Vec<usize>> {
    let folders = dirs.iter().map(|dir| StatisticsFolder::open(dir));
    let mut folders = folders.collect::<Result<Vec<_>>>()?;
    folders.sort_by_key(|folder| folder.index.shards.first().copied());
    let Some((first, others)) = folders.split_first() else {
        return Err(Error::Invalid {
            what: "merge".into(),
            why: "at least one folder of statistics expected".into(),
        });
    };
    let mut shards = first.index.shards.clone();
    for other in others {
        first.check_same(other)?;
        for shard in &other.index.shards {
            if !shards.insert(*shard) {
                return Err(other.unlike(format!("shard {} is in another folder too", shard + 1)));
            }
        }
    }
    let (origin, power) = (first.index.origin.clone(), first.index.power);
    let mut writer = StatisticsWriter::create(output, origin, power, shards)?;
    for layer_idx in 0..first.n_layers() {
        let layers = folders.iter().map(|folder| folder.layer(layer_idx));
        let mut layers = layers.collect::<Result<Vec<_>>>()?;
        for index in 0..first.groups(layer_idx).len() {
            let groups: Vec<&Group> = folders
                .iter()
                .map(|folder| &folder.groups(layer_idx)[index])
                .collect();
            let parts = layers.iter_mut().filter_map(Iterator::next);
            let (sum, mean) = merged(&groups, parts, power)?;
            writer.add(groups[0].modules.clone(), &sum, mean);
        }
        let source = first.index.layers[layer_idx].source.clone();
        writer.end_layer(source)?;
    }
    writer.finish()?;
    StatisticsFolder::open(output).map(|folder| folder.missing_shards())
}

/// A group's statistics of some folders, each counted by its mean factor.
fn merged(
    groups: &[&Group],
    parts: impl Iterator<Item = Result<Statistics>>,
    power: f64,
) -> Result<(Statistics, Option<MeanFactor>)> {
    let mut mean = groups[0].mean_factor;
    for group in &groups[1..] {
        if let (Some(mean), Some(other)) = (&mut mean, group.mean_factor) {
            mean.merge(other);
        }
    }
    let mut sum = Statistics::new(groups[0].in_features, false);
    for (part, group) in parts.zip(groups) {
        let mut part = part?;
        if let (Some(all), Some(own)) = (mean, group.mean_factor)
            && own != all
        {
            part.scale((own.mean / all.mean).powf(power));
        }
        sum.merge(&part)?;
    }
    Ok((sum, mean))
}

impl StatisticsFolder {
    fn unlike(&self, why: String) -> Error {
        Error::Invalid {
            what: self.dir.display().to_string(),
            why,
        }
    }

    fn check_same(&self, other: &Self) -> Result<()> {
        let (own, theirs) = (&self.index, &other.index);
        let first = self.dir.display();
        if own.origin != theirs.origin || own.power != theirs.power {
            let why = format!("its model, samples or settings are not those of {first}");
            return Err(other.unlike(why));
        }
        let sources = |index: &Index| {
            let layers = index.layers.iter();
            layers.map(|layer| layer.source.clone()).collect::<Vec<_>>()
        };
        if sources(own) != sources(theirs) {
            return Err(other.unlike(format!("the model's weights are not those of {first}")));
        }
        let groups = |index: &Index| {
            let groups = index.layers.iter().flat_map(|layer| &layer.groups);
            let kinds = groups.map(|g| (g.modules.clone(), g.in_features, g.mean_factor.is_some()));
            kinds.collect::<Vec<_>>()
        };
        if groups(own) != groups(theirs) {
            let why = format!("tokens weigh alike in other linears than in {first}");
            return Err(other.unlike(why));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Matrix;

    fn origin(n_shards: usize) -> Origin {
        Origin {
            vlmq: "1".into(),
            importance: Value::Null,
            samples: "x".into(),
            n_samples: 4,
            n_shards,
        }
    }

    /// Inputs and factors of one shard.
    fn part(shard: usize) -> (Matrix, Vec<f32>) {
        let value = |i: usize, j: usize| ((i * 31 + j * 17 + shard * 7) % 23) as f32 / 7.0 - 1.5;
        let factors = (0..9).map(|t| (1 + (t * 5 + shard) % 7) as f32 * (1 + shard) as f32);
        (Matrix::from_fn(9, 6, value), factors.collect())
    }

    fn weights(factors: &[f32], mean: f64) -> Vec<f32> {
        let weights = factors
            .iter()
            .map(|g| (f64::from(*g) / mean).powi(2) as f32);
        weights.collect()
    }

    fn folder(dir: &Path, shard: usize, n_shards: usize) -> PathBuf {
        let (u, factors) = part(shard);
        let mean = MeanFactor::of(std::slice::from_ref(&factors));
        let mut statistics = Statistics::new(6, false);
        let weights = weights(&factors, mean.mean);
        statistics.add("q", &u, None, Some(&weights)).unwrap();
        let path = dir.join(format!("shard-{shard}-of-{n_shards}"));
        let shards = BTreeSet::from([shard]);
        let mut writer = StatisticsWriter::create(&path, origin(n_shards), 2.0, shards).unwrap();
        writer.add(vec!["q".into(), "k".into()], &statistics, Some(mean));
        writer.end_layer("digest".into()).unwrap();
        writer.finish().unwrap();
        path
    }

    #[test]
    fn shards_add_up_to_what_all_samples_give() {
        let home = tempfile::tempdir().unwrap();
        let dirs: Vec<PathBuf> = (0..3).map(|shard| folder(home.path(), shard, 3)).collect();
        let output = home.path().join("all");
        // In any order, and some before others.
        let some = home.path().join("some");
        let missing = merge_folders(&[dirs[2].clone(), dirs[0].clone()], &some).unwrap();
        assert_eq!(missing, [1]);
        assert!(
            merge_folders(&[some, dirs[1].clone()], &output)
                .unwrap()
                .is_empty()
        );
        let found = StatisticsFolder::open(&output).unwrap();
        let found = found.layer(0).unwrap().next().unwrap().unwrap();

        let factors: Vec<Vec<f32>> = (0..3).map(|shard| part(shard).1).collect();
        let mean = MeanFactor::of(&factors).mean;
        let mut expected = Statistics::new(6, false);
        for (shard, factors) in factors.iter().enumerate() {
            let weights = weights(factors, mean);
            let u = part(shard).0;
            expected.add("q", &u, None, Some(&weights)).unwrap();
        }
        let pairs = found.hessian_lower().data().iter();
        for (found, expected) in pairs.zip(expected.hessian_lower().data()) {
            assert!((found - expected).abs() <= 1e-5 * expected.abs().max(1.0));
        }
        let (found, expected) = (
            found.effective_sample_size(),
            expected.effective_sample_size(),
        );
        assert!((found / expected - 1.0).abs() < 1e-5);
    }

    #[test]
    fn what_cannot_be_added_up_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let first = folder(home.path(), 0, 2);
        let output = home.path().join("out");
        let message = |dirs: &[PathBuf]| merge_folders(dirs, &output).unwrap_err().to_string();
        assert!(message(&[first.clone(), first.clone()]).contains("shard 1 is in another"));
        let other = folder(home.path(), 1, 3);
        assert!(message(&[first.clone(), other]).contains("are not those of"));
        assert!(message(&[]).contains("at least one"));
        std::fs::write(first.join(layer_file(0)), b"no file of tensors").unwrap();
        assert!(merge_folders(&[first], &output).is_err());
        assert!(!output.exists());
    }
}
