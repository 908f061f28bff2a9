//! An output folder that appears complete or not at all.

use super::is_plain_name;
use crate::{Error, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Temporary names tried before giving up; leftovers of killed runs with the same process number
/// occupy one each.
const MAX_ATTEMPTS: usize = 100;

/// A temporary folder beside `output` that becomes it by one rename in [`PendingFolder::commit`],
/// and is removed when dropped before that. Only a killed process leaves it behind, under a name
/// that begins with a dot and ends in `.partial-…`.
#[derive(Debug)]
pub struct PendingFolder {
    output: PathBuf,
    path: PathBuf,
    is_committed: bool,
}

impl PendingFolder {
    /// Makes the temporary folder, and the parents of `output` where there are none.
    ///
    /// # Errors
    /// [`Error::Exists`] if `output` is there already in any form, [`Error::Io`] if its parent
    /// cannot be written, [`Error::Invalid`] if it names no folder.
    pub fn create(output: &Path) -> Result<Self> {
        Self::refuse_existing(output)?;
        Self::make_parents(output)?;
        let mut last = std::io::ErrorKind::AlreadyExists.into();
        for attempt in 0..MAX_ATTEMPTS {
            let suffix = format!("partial-{}-{attempt}", std::process::id());
            let path = Self::beside(output, &suffix)?;
            match fs::create_dir(&path) {
                Ok(()) => {
                    return Ok(Self {
                        output: output.to_path_buf(),
                        path,
                        is_committed: false,
                    });
                }
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => last = e,
                Err(e) => return Err(Error::io(&path, "create the folder", e)),
            }
        }
        Err(Error::io(output, "find a free temporary name beside", last))
    }

    /// As [`PendingFolder::create`], with the temporary folder at `path`, which must be on the
    /// same file system and nobody else's business.
    ///
    /// # Errors
    /// As [`PendingFolder::create`].
    pub fn create_at(path: PathBuf, output: &Path) -> Result<Self> {
        Self::refuse_existing(output)?;
        fs::create_dir(&path).map_err(|e| Error::io(&path, "create the folder", e))?;
        Ok(Self {
            output: output.to_path_buf(),
            path,
            is_committed: false,
        })
    }

    /// # Errors
    /// [`Error::Io`] if a folder that `output` is to lie in cannot be made.
    pub fn make_parents(output: &Path) -> Result<()> {
        let parent = parent(output);
        fs::create_dir_all(parent).map_err(|e| Error::io(parent, "create the folder", e))
    }

    /// The hidden name `.OUT.suffix` beside `output`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `output` names no folder.
    pub fn beside(output: &Path, suffix: &str) -> Result<PathBuf> {
        let name = output.file_name().ok_or_else(|| Error::Invalid {
            what: output.display().to_string(),
            why: "the name of a folder to be made expected".into(),
        })?;
        Ok(parent(output).join(format!(".{}.{suffix}", name.display())))
    }

    /// # Errors
    /// [`Error::Exists`] if `output` is there in any form, [`Error::Io`] if that cannot be told.
    pub fn refuse_existing(output: &Path) -> Result<()> {
        match output.symlink_metadata() {
            Ok(_) => Err(Error::Exists {
                path: output.to_path_buf(),
            }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Error::io(output, "look for", e)),
        }
    }

    /// The temporary folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder that it will become.
    pub fn output(&self) -> &Path {
        &self.output
    }

    /// Writes a new file.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `name` is not a bare file name, [`Error::Io`] if the file exists or
    /// cannot be written.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.new_path(name)?;
        let mut file = File::create_new(&path).map_err(|e| Error::io(&path, "create", e))?;
        file.write_all(bytes)
            .map_err(|e| Error::io(&path, "write", e))
    }

    /// Copies the file `name` of another folder, byte for byte, into the same subfolder if `name`
    /// has one before a `/`; a link is followed.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a part of `name` is no bare name, [`Error::Io`] if the file exists,
    /// cannot be written, or the source cannot be read.
    pub fn copy_from(&self, dir: &Path, name: &str) -> Result<()> {
        name.split('/').try_for_each(check_name)?;
        let (from, to) = (dir.join(name), self.path.join(name));
        let folder = parent(&to);
        fs::create_dir_all(folder).map_err(|e| Error::io(folder, "create the folder", e))?;
        let mut source = File::open(&from).map_err(|e| Error::io(&from, "read", e))?;
        let mut copy = File::create_new(&to).map_err(|e| Error::io(&to, "create", e))?;
        std::io::copy(&mut source, &mut copy).map_err(|e| Error::io(&to, "write", e))?;
        Ok(())
    }

    /// Puts everything on disk and gives the folder its name.
    ///
    /// # Errors
    /// [`Error::Exists`] if `output` came into being meanwhile, [`Error::Io`] if the disk refuses;
    /// the temporary folder is removed then.
    pub fn commit(mut self) -> Result<()> {
        sync_all(&self.path)?;
        Self::refuse_existing(&self.output)?;
        fs::rename(&self.path, &self.output)
            .map_err(|e| Error::io(&self.output, "rename the finished folder to", e))?;
        self.is_committed = true;
        sync(parent(&self.output))
    }

    fn new_path(&self, name: &str) -> Result<PathBuf> {
        check_name(name)?;
        Ok(self.path.join(name))
    }
}

fn check_name(name: &str) -> Result<()> {
    match is_plain_name(name) {
        true => Ok(()),
        false => Err(Error::Invalid {
            what: format!("{name:?}"),
            why: "a bare file name expected".into(),
        }),
    }
}

impl Drop for PendingFolder {
    fn drop(&mut self) {
        if !self.is_committed {
            // Nothing can be reported from here, and a leftover folder harms no later run.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// The folder that holds `path`; "." for a bare name.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// Puts a folder, with all that is in it, on disk.
fn sync_all(dir: &Path) -> Result<()> {
    let list = |e| Error::io(dir, "list", e);
    for entry in fs::read_dir(dir).map_err(list)? {
        let entry = entry.map_err(list)?;
        match entry.file_type().map_err(list)?.is_dir() {
            true => sync_all(&entry.path())?,
            false => sync(&entry.path())?,
        }
    }
    sync(dir)
}

fn sync(path: &Path) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
    file.sync_all()
        .map_err(|e| Error::io(path, "put on disk", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn commit_renames_and_drop_removes() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out");
        let pending = PendingFolder::create(&output).unwrap();
        pending.write_file("a.txt", b"one").unwrap();
        assert!(!output.exists());
        drop(pending);
        assert_eq!(entries(dir.path()), 0);

        let pending = PendingFolder::create(&output).unwrap();
        pending.write_file("a.txt", b"one").unwrap();
        pending.copy_from(pending.path(), "a.txt").unwrap_err();
        pending.commit().unwrap();
        assert_eq!(fs::read(output.join("a.txt")).unwrap(), b"one");
        assert_eq!(entries(dir.path()), 1);
    }

    #[test]
    fn an_existing_output_is_refused_at_both_ends() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out");
        let pending = PendingFolder::create(&output).unwrap();
        fs::create_dir(&output).unwrap();
        let at_start = PendingFolder::create(&output).unwrap_err();
        assert!(matches!(at_start, Error::Exists { path } if path == output));
        assert!(matches!(pending.commit(), Err(Error::Exists { .. })));
        assert_eq!(entries(dir.path()), 1);
    }

    #[test]
    fn an_unwritable_place_is_an_io_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, b"x").unwrap();
        for output in [file.join("out"), file.join("absent/out")] {
            assert!(matches!(
                PendingFolder::create(&output),
                Err(Error::Io { .. })
            ));
        }
        assert!(PendingFolder::create(&dir.path().join("absent/out")).is_ok());
        assert!(matches!(
            PendingFolder::create(Path::new("..")),
            Err(Error::Exists { .. })
        ));
    }

    #[test]
    fn names_cannot_leave_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let pending = PendingFolder::create(&dir.path().join("out")).unwrap();
        for name in ["../x", "/x", "a/b", "", ".", "..", "a\\b", "./x", "x/"] {
            let error = pending.write_file(name, b"").unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }), "{name}");
        }
        assert_eq!(entries(pending.path()), 0);
        let from = tempfile::tempdir().unwrap();
        fs::create_dir_all(from.path().join("a/b")).unwrap();
        fs::write(from.path().join("a/b/x"), "1").unwrap();
        for name in ["../x", "/x", "a/../a/b/x", "a//b/x", "a/b/", "a/./b/x"] {
            let error = pending.copy_from(from.path(), name).unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }), "{name}");
        }
        pending.copy_from(from.path(), "a/b/x").unwrap();
        assert_eq!(fs::read(pending.path().join("a/b/x")).unwrap(), b"1");
        pending.commit().unwrap();
        assert!(dir.path().join("out/a/b/x").exists());
    }
}
