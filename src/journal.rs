//! Finished layers on disk, so that a run that was ended goes on from where it was.
//!
//! While a run that makes the folder `OUT` is under way, `.OUT.progress` lies beside it:
//! - `run.json`: what the run is made of, so that another one does not take its layers for its own;
//! - `layer-00000.vlmq` …: each finished layer (`layer_file`), written under another name, put on
//!   disk and only then renamed;
//! - `folder`: the output in the making, of no worth to a later run;
//! - `lock`: held by the process at work.
//!
//! The streams of hidden states are not kept: they are made again by passing the samples through
//! the finished layers, which costs two forwards a layer and gives the same bits.

mod layer_file;

use crate::checkpoint::PendingFolder;
use crate::pipeline::FinishedLayer;
use crate::{Error, Result};
pub use layer_file::LayerWriter;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

const RUN_FILE: &str = "run.json";
const LOCK_FILE: &str = "lock";
/// A finished folder that becomes the output in another form.
const CODES: &str = "codes";
const FOLDER: &str = "folder";

/// What to do about the layers of an earlier run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// Go on with them if there are any.
    #[default]
    Auto,
    /// There must be some.
    Required,
    /// Remove them.
    Never,
}

/// What decides the bytes of a run, the layers' own weights aside, which each layer's file answers
/// for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Version of the program.
    pub vlmq: String,
    /// Method, formats and settings, in words.
    pub settings: String,
    /// Digest of the samples as the first layer sees them.
    pub samples: String,
    /// Shards that they are summed up in.
    pub n_shards: usize,
}

impl Fingerprint {
    /// What of `self` an earlier run had otherwise.
    fn difference(&self, earlier: &Self) -> Option<&'static str> {
        let parts = [
            (self.vlmq == earlier.vlmq, "version of vlmq"),
            (self.settings == earlier.settings, "settings"),
            (self.samples == earlier.samples, "samples"),
            (self.n_shards == earlier.n_shards, "number of shards"),
        ];
        parts
            .into_iter()
            .find_map(|(same, what)| (!same).then_some(what))
    }
}

/// The progress folder of one output, in the hands of this process.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    output: PathBuf,
    /// Held open: the lock goes with it.
    _lock: File,
}

impl Journal {
    /// Takes the progress folder of `output`, or makes it.
    ///
    /// # Errors
    /// [`Error::Exists`] if `output` is there already, [`Error::Busy`] if another process is at
    /// work on it, [`Error::Missing`] if progress is required and there is none, [`Error::Io`].
    pub fn open(output: &Path, resume: Resume) -> Result<Self> {
        PendingFolder::refuse_existing(output)?;
        let dir = PendingFolder::beside(output, "progress")?;
        PendingFolder::make_parents(output)?;
        match fs::create_dir(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io(&dir, "create the folder", e));
            }
            _ => {}
        }
        let journal = Self {
            _lock: lock(&dir)?,
            dir,
            output: output.to_path_buf(),
        };
        journal.sweep(resume == Resume::Never)?;
        if resume == Resume::Required && journal.n_finished()? == 0 {
            return Err(Error::Missing {
                what: "a finished layer of an earlier run".into(),
                place: journal.dir.display().to_string(),
            });
        }
        Ok(journal)
    }

    /// What a run that was ended has kept for `output`: the folder and how many layers, if any.
    pub fn kept(output: &Path) -> Option<(PathBuf, usize)> {
        let dir = PendingFolder::beside(output, "progress").ok()?;
        let n_layers = n_finished(&dir).ok().filter(|n| *n > 0)?;
        Some((dir, n_layers))
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The output folder in the making.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn pending(&self) -> Result<PendingFolder> {
        PendingFolder::create_at(self.dir.join(FOLDER), &self.output)
    }

    /// As [`Journal::pending`], of a folder that is finished here and turned into the output then.
    ///
    /// # Errors
    /// [`Error::Io`] if the disk refuses.
    pub fn pending_codes(&self) -> Result<PendingFolder> {
        PendingFolder::create_at(self.dir.join(FOLDER), &self.codes())
    }

    /// Where that folder is.
    pub fn codes(&self) -> PathBuf {
        self.dir.join(CODES)
    }

    /// Notes what this run is made of, or makes sure that the earlier one was made of the same.
    ///
    /// # Errors
    /// [`Error::OtherRun`] if it was not, [`Error::Io`].
    pub fn bind(&self, fingerprint: &Fingerprint) -> Result<()> {
        let path = self.dir.join(RUN_FILE);
        if let Some(earlier) = self.earlier()? {
            return match fingerprint.difference(&earlier) {
                None => Ok(()),
                Some(what) => Err(Error::OtherRun {
                    path: self.dir.clone(),
                    what: what.into(),
                }),
            };
        }
        let bytes = serde_json::to_vec_pretty(fingerprint).expect("words only");
        let unfinished = path.with_extension("unfinished");
        fs::write(&unfinished, bytes).map_err(|e| Error::io(&unfinished, "write", e))?;
        layer_file::put_in_place(&unfinished, &path)
    }

    /// How many shards a run is to have: as many as the earlier one had, unless it is told
    /// otherwise, which [`Journal::bind`] will refuse then.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] if the note of the earlier run is damaged.
    pub fn n_shards(&self, told: Option<usize>, otherwise: usize) -> Result<usize> {
        let earlier = self.earlier()?.map(|run| run.n_shards);
        Ok(told.or(earlier).unwrap_or(otherwise))
    }

    /// What the run was made of that finished layers.
    fn earlier(&self) -> Result<Option<Fingerprint>> {
        if self.n_finished()? == 0 {
            return Ok(None);
        }
        let path = self.dir.join(RUN_FILE);
        let bytes = fs::read(&path).map_err(|e| Error::io(&path, "read", e))?;
        let earlier = serde_json::from_slice(&bytes);
        earlier
            .map(Some)
            .map_err(|e| Error::format(&path, "run", e.to_string()))
    }

    /// How many layers are finished.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn n_finished(&self) -> Result<usize> {
        n_finished(&self.dir)
    }

    /// The file that a finished layer is in or will be in.
    pub fn layer_path(&self, layer_idx: usize) -> PathBuf {
        self.dir.join(layer_file::name(layer_idx))
    }

    /// A finished layer, if it is; `source` digests the weights that it must have been made from.
    ///
    /// # Errors
    /// [`Error::Format`] if its file is damaged, [`Error::OtherRun`] if it was made from other
    /// weights, [`Error::Io`]; `source`'s.
    pub fn finished(
        &self,
        layer_idx: usize,
        source: impl FnOnce() -> Result<String>,
    ) -> Result<Option<FinishedLayer>> {
        let path = self.layer_path(layer_idx);
        let Some(file) = layer_file::read(&path, layer_idx)? else {
            return Ok(None);
        };
        if file.source != source()? {
            return Err(Error::OtherRun {
                path: self.dir.clone(),
                what: format!("weights of layer {layer_idx}"),
            });
        }
        Ok(Some(FinishedLayer {
            weights: file.weights,
            tensors: file.tensors,
            outcome: file.record,
        }))
    }

    /// Takes everything away, once the output has its name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn discard(self) -> Result<()> {
        fs::remove_dir_all(&self.dir).map_err(|e| Error::io(&self.dir, "remove", e))
    }

    /// Removes what a killed run left unfinished, and with `everything` its finished layers too.
    fn sweep(&self, everything: bool) -> Result<()> {
        for name in names(&self.dir)? {
            let path = self.dir.join(&name);
            let is_kept = name == RUN_FILE || layer_file::is_finished(&name);
            if name == LOCK_FILE || (is_kept && !everything) {
                continue;
            }
            let removed = match path.is_dir() {
                true => fs::remove_dir_all(&path),
                false => fs::remove_file(&path),
            };
            removed.map_err(|e| Error::io(&path, "remove", e))?;
        }
        Ok(())
    }
}

impl Drop for Journal {
    /// A folder without a finished layer is of no use to anybody.
    fn drop(&mut self) {
        if self.dir.exists() && matches!(self.n_finished(), Ok(0)) {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK_FILE);
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| Error::io(&path, "create", e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Busy {
            path: dir.to_path_buf(),
        }),
        Err(TryLockError::Error(e)) => Err(Error::io(&path, "lock", e)),
    }
}

fn n_finished(dir: &Path) -> Result<usize> {
    let names = names(dir)?;
    Ok(names.iter().filter(|n| layer_file::is_finished(n)).count())
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let list = |e| Error::io(dir, "list", e);
    let entries = fs::read_dir(dir).map_err(list)?;
    entries
        .map(|entry| Ok(entry.map_err(list)?.file_name().to_string_lossy().into()))
        .collect()
}

#[cfg(test)]
mod tests;
