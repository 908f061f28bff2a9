//! Where the image of a sample lies, and reading it when it is wanted.

use crate::processor::{RgbImage, decode_image};
use crate::{Error, Result};
use base64::Engine;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex};
use zip::ZipArchive;
use zip::result::ZipError;

/// Largest encoded image that is read.
const MAX_IMAGE_BYTES: u64 = 256 << 20;

/// An image that is not read yet.
#[derive(Clone, Debug)]
pub enum ImageSource {
    /// A file of its own.
    File(PathBuf),
    /// Encoded bytes, as parquet holds them.
    Bytes {
        /// What to call it in messages.
        name: String,
        /// PNG, JPEG or another format, told by content.
        bytes: Arc<[u8]>,
    },
    /// Base64 text, as TSV files and data addresses hold it.
    Base64 {
        /// What to call it in messages.
        name: String,
        /// The encoded bytes; line breaks and blanks are allowed.
        text: Arc<str>,
    },
    /// A member of an archive.
    Member {
        /// The archive beside the data file.
        archive: Arc<Archive>,
        /// The member's name in it.
        name: String,
    },
}

impl ImageSource {
    /// What to call the image in messages.
    pub fn name(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Bytes { name, .. } | Self::Base64 { name, .. } => name.clone(),
            Self::Member { archive, name } => format!("{}/{name}", archive.path.display()),
        }
    }

    /// The encoded image.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the image if it cannot be read or is larger than
    /// 256 MiB.
    pub fn read(&self) -> Result<Vec<u8>> {
        match self {
            Self::File(path) => {
                let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
                read_limited(path, file)
            }
            Self::Bytes { bytes, .. } => Ok(bytes.to_vec()),
            Self::Base64 { name, text } => {
                let compact: String = text.chars().filter(|c| !c.is_whitespace()).collect();
                let decoded = base64::engine::general_purpose::STANDARD.decode(compact);
                decoded.map_err(|e| Error::format(Path::new(name), "base64", e.to_string()))
            }
            Self::Member { archive, name } => archive.read(name),
        }
    }

    /// The image as upright RGB.
    ///
    /// # Errors
    /// As [`ImageSource::read`] and [`decode_image`].
    pub fn load(&self) -> Result<RgbImage> {
        decode_image(&self.name(), &self.read()?)
    }
}

fn read_limited(path: &Path, reader: impl Read) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut reader = reader.take(MAX_IMAGE_BYTES + 1);
    let n = reader.read_to_end(&mut bytes);
    let n = n.map_err(|e| Error::io(path, "read", e))? as u64;
    if n > MAX_IMAGE_BYTES {
        let why = format!("more than the {MAX_IMAGE_BYTES} bytes allowed for an image");
        return Err(Error::format(path, "file size", why));
    }
    Ok(bytes)
}

/// A ZIP file whose members are read one at a time into memory.
pub struct Archive {
    path: PathBuf,
    zip: Mutex<ZipArchive<BufReader<File>>>,
}

impl std::fmt::Debug for Archive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Archive({})", self.path.display())
    }
}

impl Archive {
    /// Reads the directory of the archive.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::Format`] if it is no ZIP file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
        let zip = ZipArchive::new(BufReader::new(file)).map_err(|e| zip_error(path, "", e))?;
        Ok(Self {
            path: path.to_path_buf(),
            zip: Mutex::new(zip),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ZipArchive<BufReader<File>>> {
        // Every read seeks anew, so a thread that died while reading leaves nothing half-done.
        self.zip.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn contains(&self, name: &str) -> bool {
        self.lock().index_for_name(name).is_some()
    }

    fn read(&self, name: &str) -> Result<Vec<u8>> {
        let mut zip = self.lock();
        let member = zip
            .by_name(name)
            .map_err(|e| zip_error(&self.path, name, e))?;
        read_limited(&self.path.join(name), member)
    }
}

fn zip_error(path: &Path, member: &str, error: ZipError) -> Error {
    match error {
        ZipError::Io(e) => Error::io(path, "read", e),
        e => Error::format(path, format!("member {member:?}"), e.to_string()),
    }
}

/// The folder of a data file, where its image names are looked up.
#[derive(Debug)]
pub struct ImageFolder {
    dir: PathBuf,
    archive: Option<Arc<Archive>>,
}

impl ImageFolder {
    /// The folder `dir` with the `images.zip` in it, if there is one.
    ///
    /// # Errors
    /// As [`Archive::open`].
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("images.zip");
        let archive = if path.is_file() {
            Some(Arc::new(Archive::open(&path)?))
        } else {
            None
        };
        Ok(Self {
            dir: dir.to_path_buf(),
            archive,
        })
    }

    /// The image called `name` by the row `origin`: a file below the folder, else a member of the
    /// archive, else, for a `data:` address, the bytes in the name itself.
    ///
    /// # Errors
    /// [`Error::Invalid`] for names that leave the folder, [`Error::Unsupported`] for web
    /// addresses, [`Error::Missing`] if it is in neither place.
    pub fn resolve(&self, origin: &str, name: &str) -> Result<ImageSource> {
        if let Some(rest) = name.strip_prefix("data:") {
            return data_address(origin, rest);
        }
        if name.contains("://") {
            return Err(Error::Unsupported {
                what: format!("{origin}: image {name:?}; images are not downloaded, save it here"),
            });
        }
        if !is_inside(name) {
            return Err(Error::Invalid {
                what: format!("{origin}: image {name:?}"),
                why: "a relative name without `..` or backslash expected".into(),
            });
        }
        let path = self.dir.join(name);
        if path.is_file() {
            return Ok(ImageSource::File(path));
        }
        match &self.archive {
            Some(archive) if archive.contains(name) => Ok(ImageSource::Member {
                archive: Arc::clone(archive),
                name: name.to_owned(),
            }),
            _ => Err(Error::Missing {
                what: format!("image {name:?} of {origin}"),
                place: format!("{} and its images.zip", self.dir.display()),
            }),
        }
    }
}

/// A plain relative name: no root, no drive, no step upwards, on any system.
fn is_inside(name: &str) -> bool {
    let plain = |c: Component<'_>| matches!(c, Component::Normal(_) | Component::CurDir);
    let drive = name.as_bytes().get(1) == Some(&b':');
    !name.is_empty()
        && !drive
        && !name.contains(['\\', '\0'])
        && Path::new(name).components().all(plain)
}

fn data_address(origin: &str, rest: &str) -> Result<ImageSource> {
    let (kind, text) = rest.split_once(',').unwrap_or((rest, ""));
    if !kind.ends_with(";base64") {
        return Err(Error::Unsupported {
            what: format!("{origin}: data address {kind:?}; only base64 ones are read"),
        });
    }
    Ok(ImageSource::Base64 {
        name: format!("{origin}: image"),
        text: text.into(),
    })
}
