use super::write::{MAX_SHARD_BYTES, ShardedWriter, TensorSpec};
use super::*;
use proptest::prelude::*;
use std::fs;
use tempfile::TempDir;

/// A folder with these float tensors `(name, dtype, shape, values)`.
fn folder(tensors: &[(&str, DType, &[usize], &[f32])], max_shard_bytes: u64) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(CONFIG_FILE), "{\"model_type\": \"x\"}").unwrap();
    let specs = tensors.iter().map(|(name, dtype, shape, _)| TensorSpec {
        name: (*name).to_owned(),
        dtype: *dtype,
        shape: shape.to_vec(),
    });
    let mut writer = ShardedWriter::create(dir.path(), specs.collect(), max_shard_bytes).unwrap();
    for (name, dtype, _, values) in tensors {
        writer
            .write(name, &dtype.bytes_from_f32(values).unwrap())
            .unwrap();
    }
    writer.finish().unwrap();
    dir
}

fn small(max_shard_bytes: u64) -> TempDir {
    folder(
        &[
            ("b.weight", DType::F32, &[2, 2], &[1.0, 2.0, 3.0, 4.0]),
            ("a.weight", DType::Bf16, &[1, 3], &[0.5, -1.0, 2.0]),
            ("c.bias", DType::F16, &[2], &[0.25, 8.0]),
        ],
        max_shard_bytes,
    )
}

fn error_of(dir: &Path) -> Error {
    match Checkpoint::open(dir) {
        Ok(_) => panic!("the folder was accepted"),
        Err(e) => e,
    }
}

fn edit_index(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join(INDEX_FILE);
    let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut index["weight_map"]);
    fs::write(&path, index.to_string()).unwrap();
}

#[test]
fn one_file_and_shards_read_alike() {
    for (limit, n_shards) in [(MAX_SHARD_BYTES, 1), (16, 3)] {
        let dir = small(limit);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.shard_paths().count(), n_shards);
        assert_eq!(
            checkpoint.names().collect::<Vec<_>>(),
            ["a.weight", "b.weight", "c.bias"]
        );
        assert_eq!(
            checkpoint.load("a.weight", &[1, 3]).unwrap(),
            [0.5, -1.0, 2.0]
        );
        let weight = checkpoint.linear_weight("b", 2, 2).unwrap();
        assert_eq!(weight.data(), [1.0, 2.0, 3.0, 4.0]);
        assert_eq!(checkpoint.load("c.bias", &[2]).unwrap(), [0.25, 8.0]);
        assert_eq!(checkpoint.total_bytes(), 16 + 6 + 4);
        assert_eq!(checkpoint.info("a.weight").unwrap().dtype, DType::Bf16);
        assert_eq!(checkpoint.config()["model_type"], "x");
    }
}

#[test]
fn requests_that_do_not_fit_are_named() {
    let dir = small(MAX_SHARD_BYTES);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let shape = checkpoint.load("b.weight", &[4]).unwrap_err();
    assert_eq!(
        shape.to_string(),
        "b.weight: expected shape [4], found [2, 2]"
    );
    let missing = checkpoint.linear_weight("d", 1, 1).unwrap_err();
    assert!(
        missing
            .to_string()
            .starts_with("missing tensor d.weight in "),
        "{missing}"
    );
}

#[test]
fn nan_and_infinity_are_named_with_their_count() {
    let values = [1.0, f32::NAN, f32::INFINITY];
    for dtype in [DType::Bf16, DType::F16, DType::F32] {
        let dir = folder(&[("w", dtype, &[3], &values)], MAX_SHARD_BYTES);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let error = checkpoint.load("w", &[3]).unwrap_err().to_string();
        assert_eq!(error, "w: 2 value(s) are NaN or infinite in weights");
    }
}

#[test]
fn a_file_that_is_written_to_is_noticed() {
    let dir = small(MAX_SHARD_BYTES);
    let path = dir.path().join(WEIGHTS_FILE);
    let bytes = fs::read(&path).unwrap();
    let noticed = |change: &dyn Fn()| {
        fs::write(&path, &bytes).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        checkpoint.load("a.weight", &[1, 3]).unwrap();
        change();
        checkpoint.load("a.weight", &[1, 3]).map(|_| ())
    };
    let cut = noticed(&|| fs::write(&path, &bytes[..bytes.len() / 2]).unwrap());
    assert!(cut.unwrap_err().to_string().contains("written to"));
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(9);
    let touched = noticed(&|| {
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(later).unwrap();
    });
    assert!(touched.unwrap_err().to_string().contains("written to"));
    // A file that takes its name is another file; the open one stays as it was.
    let replaced = noticed(&|| {
        fs::write(dir.path().join("new"), b"no weights").unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
    });
    assert!(replaced.is_ok());
}

#[test]
fn an_integer_tensor_is_no_weight() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(CONFIG_FILE), "{}").unwrap();
    let spec = TensorSpec {
        name: "w".into(),
        dtype: DType::I32,
        shape: vec![1],
    };
    let mut writer = ShardedWriter::create(dir.path(), vec![spec], 9).unwrap();
    writer.write("w", &[0; 4]).unwrap();
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let error = checkpoint.load("w", &[1]).unwrap_err().to_string();
    assert!(
        error.ends_with("tensor w: expected BF16, F16, F32 or F64, found I32"),
        "{error}"
    );
}

#[test]
fn a_bad_config_is_named() {
    let dir = small(MAX_SHARD_BYTES);
    let config = dir.path().join(CONFIG_FILE);
    for (text, expected) in [
        ("[1]", "JSON: expected an object"),
        ("{", "JSON: EOF"),
        (
            "{\"quantization_config\": {\"quant_method\": \"bitsandbytes\"}}",
            "quant_method is \"bitsandbytes\"",
        ),
        ("{\"quantization_config\": 3}", "quant_method is null"),
    ] {
        fs::write(&config, text).unwrap();
        let error = error_of(dir.path()).to_string();
        assert!(error.contains(expected), "{error}");
    }
    fs::write(&config, [0xff, 0xfe]).unwrap();
    assert!(error_of(dir.path()).to_string().contains("not UTF-8"));
    fs::remove_file(&config).unwrap();
    assert!(matches!(error_of(dir.path()), Error::Missing { what, .. } if what == CONFIG_FILE));
    fs::create_dir(&config).unwrap();
    assert!(
        error_of(dir.path())
            .to_string()
            .contains("expected a regular file")
    );
}

#[test]
fn missing_or_unreadable_weights_are_named() {
    let dir = small(MAX_SHARD_BYTES);
    let weights = dir.path().join(WEIGHTS_FILE);
    fs::write(&weights, b"").unwrap();
    assert!(
        error_of(dir.path())
            .to_string()
            .contains("at least 8 bytes, found 0")
    );
    fs::remove_file(&weights).unwrap();
    assert!(matches!(error_of(dir.path()), Error::Missing { what, .. } if what == WEIGHTS_FILE));
    fs::create_dir(&weights).unwrap();
    assert!(error_of(dir.path()).to_string().contains("regular file"));
    let absent = error_of(&dir.path().join("absent"));
    assert!(matches!(absent, Error::Missing { .. }));
}

#[test]
fn a_bad_index_is_named() {
    let first = "model-00001-of-00003.safetensors";
    type Edit = Box<dyn FnOnce(&mut Value)>;
    let edits: [(&str, Edit); 7] = [
        (
            "\"../x.safetensors\"",
            Box::new(|m| m["c.bias"] = "../x.safetensors".into()),
        ),
        (
            "\"/x.safetensors\"",
            Box::new(|m| m["c.bias"] = "/x.safetensors".into()),
        ),
        ("\"x.bin\"", Box::new(|m| m["c.bias"] = "x.bin".into())),
        ("expected a file name", Box::new(|m| m["c.bias"] = 1.into())),
        (
            "tensor c.bias: expected in model-00001",
            Box::new(|m| m["c.bias"] = first.into()),
        ),
        ("found in no shard", Box::new(|m| m["d"] = first.into())),
        (
            "weight_map: expected an object",
            Box::new(|m| *m = Value::Null),
        ),
    ];
    for (expected, edit) in edits {
        let dir = small(16);
        edit_index(dir.path(), edit);
        let error = error_of(dir.path()).to_string();
        assert!(error.contains(expected), "{error}");
    }
    let dir = small(16);
    fs::rename(dir.path().join(first), dir.path().join("moved")).unwrap();
    assert!(matches!(error_of(dir.path()), Error::Missing { what, .. } if what == first));
    let dir = small(16);
    fs::copy(dir.path().join(first), dir.path().join("more.safetensors")).unwrap();
    edit_index(dir.path(), |m| m["x"] = "more.safetensors".into());
    assert!(
        error_of(dir.path())
            .to_string()
            .contains("tensor a.weight: is already in")
    );
    let dir = small(22);
    edit_index(dir.path(), |m| {
        drop(m.as_object_mut().unwrap().remove("a.weight"))
    });
    let error = error_of(dir.path()).to_string();
    assert!(error.contains("does not list tensor a.weight"), "{error}");
}

#[test]
fn side_files_are_regular_files_without_weights() {
    let dir = small(MAX_SHARD_BYTES);
    for name in ["tokenizer.json", "README.md", "pytorch_model.bin", "x.gguf"] {
        fs::write(dir.path().join(name), "x").unwrap();
    }
    for name in [
        "sub/deep/a.py",
        "sub/model.onnx",
        ".git/b",
        "sub/__pycache__/c",
    ] {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
    }
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let files = checkpoint.side_files().unwrap();
    let names: Vec<String> = files
        .iter()
        .map(|path| checkpoint.side_name(path).unwrap())
        .collect();
    let expected = [
        "README.md",
        "config.json",
        "sub/deep/a.py",
        "tokenizer.json",
    ];
    assert_eq!(names, expected);
}

#[cfg(unix)]
#[test]
fn side_files_follow_links_inside_only() {
    use std::os::unix::fs::symlink;
    let dir = small(MAX_SHARD_BYTES);
    symlink("config.json", dir.path().join("inside.json")).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.side_files().unwrap().len(), 2);
    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("secret"), "x").unwrap();
    symlink(other.path().join("secret"), dir.path().join("notes.txt")).unwrap();
    let error = checkpoint.side_files().unwrap_err().to_string();
    assert!(error.contains("notes.txt: links to"), "{error}");
    fs::remove_file(dir.path().join("notes.txt")).unwrap();
    symlink(other.path(), dir.path().join("folder")).unwrap();
    let error = checkpoint.side_files().unwrap_err().to_string();
    assert!(error.contains("folder: links to a folder"), "{error}");
}

#[cfg(unix)]
#[test]
fn a_download_cache_is_read_through_its_links() {
    use std::os::unix::fs::symlink;
    let source = small(MAX_SHARD_BYTES);
    let cache = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (
        cache.path().join("blobs"),
        cache.path().join("snapshots/rev"),
    );
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    for name in [CONFIG_FILE, WEIGHTS_FILE] {
        fs::copy(source.path().join(name), blobs.join(name)).unwrap();
        symlink(Path::new("../../blobs").join(name), snapshot.join(name)).unwrap();
    }
    let checkpoint = Checkpoint::open(&snapshot).unwrap();
    assert_eq!(checkpoint.load("c.bias", &[2]).unwrap(), [0.25, 8.0]);
    assert_eq!(
        checkpoint.side_files().unwrap(),
        [snapshot.join(CONFIG_FILE)]
    );
}

/// Files that the Python packages wrote; see `tests/oracle/make_checkpoint_golden.py`.
fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/checkpoint/golden")
}

#[test]
fn a_file_of_the_python_package_reads_as_torch_reads_it() {
    let checkpoint = Checkpoint::open(&golden()).unwrap();
    for dtype in ["bf16", "f16", "f32", "f64"] {
        let found = checkpoint.load(&format!("plain.{dtype}"), &[3, 5]).unwrap();
        let expected = checkpoint
            .load(&format!("plain.{dtype}.as_f32"), &[3, 5])
            .unwrap();
        assert_eq!(found, expected, "{dtype}");
    }
}

#[test]
fn weights_packed_by_compressed_tensors_dequantize_as_it_does() {
    let checkpoint = Checkpoint::open(&golden()).unwrap();
    let modules: Vec<&str> = checkpoint
        .names()
        .filter_map(|name| name.strip_suffix(".weight_packed"))
        .collect();
    assert_eq!(modules.len(), 16);
    for module in modules {
        let expected = format!("{module}.dequantized");
        let shape = checkpoint.info(&expected).unwrap().shape.clone();
        let expected = checkpoint.load(&expected, &shape).unwrap();
        let found = checkpoint
            .linear_weight(module, shape[0], shape[1])
            .unwrap();
        assert_eq!(found.data(), expected, "{module}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn reading_inverts_writing(
        tensors in prop::collection::btree_map(
            "[a-z.\"\\\\é]{1,8}",
            (prop::sample::select(vec![DType::U8, DType::Bf16, DType::F32, DType::I64]),
             prop::collection::vec(0usize..4, 0..4), any::<u8>()),
            1..6,
        ),
        limit in 1u64..64,
    ) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONFIG_FILE), "{}").unwrap();
        let specs = tensors.iter().map(|(name, (dtype, shape, _))| TensorSpec {
            name: name.clone(), dtype: *dtype, shape: shape.clone(),
        }).collect();
        let size = |dtype: DType, shape: &[usize]| {
            dtype.n_bytes() * shape.iter().product::<usize>()
        };
        let mut writer = ShardedWriter::create(dir.path(), specs, limit).unwrap();
        for (name, (dtype, shape, fill)) in &tensors {
            writer.write(name, &vec![*fill; size(*dtype, shape)]).unwrap();
        }
        writer.finish().unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        prop_assert_eq!(checkpoint.names().count(), tensors.len());
        for (name, (dtype, shape, fill)) in &tensors {
            let info = checkpoint.info(name).unwrap();
            prop_assert_eq!((info.dtype, &info.shape), (*dtype, shape));
            prop_assert_eq!(checkpoint.bytes(name).unwrap(), vec![*fill; size(*dtype, shape)]);
        }
    }

    #[test]
    fn damaged_files_are_refused_or_keep_their_structure(
        cut in prop::option::of(any::<prop::sample::Index>()),
        flip in any::<prop::sample::Index>(),
        bit in 0u8..8,
    ) {
        let dir = small(MAX_SHARD_BYTES);
        let path = dir.path().join(WEIGHTS_FILE);
        let mut bytes = fs::read(&path).unwrap();
        let position = flip.index(bytes.len());
        bytes[position] ^= 1 << bit;
        if let Some(cut) = &cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        fs::write(&path, &bytes).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
            prop_assert!(cut.is_none());
            prop_assert_eq!(checkpoint.total_bytes(), 26);
            for name in checkpoint.names() {
                let shape = checkpoint.info(name).unwrap().shape.clone();
                if let Ok(values) = checkpoint.load(name, &shape) {
                    prop_assert_eq!(values.len(), shape.iter().product::<usize>());
                }
            }
        }
    }
}
