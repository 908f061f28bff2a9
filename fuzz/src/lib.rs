//! What the targets share.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use vlmq::checkpoint::Checkpoint;
use vlmq::dataset::SampleSet;
use vlmq::processor::Message;

/// Where files cost no disk; the system's temporary folder where there is no such place.
const IN_MEMORY: &str = "/dev/shm";

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let parent = Path::new(IN_MEMORY);
    let parent = match parent.is_dir() {
        true => parent.to_path_buf(),
        false => std::env::temp_dir(),
    };
    let folder = tempfile::Builder::new()
        .prefix("vlmq-fuzz-")
        .tempdir_in(parent);
    folder.expect("a folder for the input").keep()
});

/// The folder that this process writes its inputs to.
pub fn folder() -> &'static Path {
    &FOLDER
}

/// Writes `name` in [`folder`], over what was there.
pub fn put(name: &str, bytes: &[u8]) -> PathBuf {
    let path = FOLDER.join(name);
    std::fs::write(&path, bytes).expect("the input is written");
    path
}

/// The fuzzer ends at every panic, even one that the library catches and makes an error of. After
/// this it ends only at those that leave the library.
pub fn let_caught_panics_pass() {
    std::panic::set_hook(Box::new(|_| {}));
}

/// Asks everything of every tensor that can be asked.
pub fn read_all(checkpoint: &Checkpoint) {
    let names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
    let mut total = 0;
    for name in &names {
        let info = checkpoint.info(name).expect("a tensor that is listed");
        let bytes = checkpoint
            .bytes(name)
            .expect("bytes that the header was checked for");
        assert_eq!(bytes.len(), info.n_bytes);
        total += bytes.len() as u64;
        let _ = checkpoint.check_finite(name);
        if let Ok(values) = checkpoint.load(name, &info.shape) {
            assert_eq!(values.len() * info.dtype.n_bytes(), info.n_bytes);
        }
        if let Some(module) = checkpoint.packed_owner(name) {
            let _ = checkpoint.linear_info(module);
        }
    }
    for module in checkpoint.quantized_modules() {
        if let Ok(weight) = checkpoint.packed_module(&module) {
            let shape = (weight.rows(), weight.cols());
            let matrix = checkpoint.linear_weight(&module, shape.0, shape.1);
            matrix.expect("a weight that was read before");
        }
    }
    let _ = vlmq::verification::verify_folder(checkpoint, None);
    assert_eq!(checkpoint.total_bytes(), total);
    checkpoint.digest("").expect("bytes that were read before");
}

/// Makes sure that each image has its place.
pub fn check_places(samples: vlmq::Result<SampleSet>) {
    for sample in samples.iter().flat_map(|set| set.samples()) {
        let n_places: usize = sample.messages().iter().map(Message::n_images).sum();
        assert_eq!(n_places, sample.images().len());
    }
}
