//! The main flow on tiny models in all spellings, down to the bytes that are written.

use super::tiny::{Home, N_MODULES, Spelling, read_tensors};
use super::{json, text, vlmq};
use safetensors::tensor::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;

/// Suffixes of what stands in the place of a quantized weight.
const PACKED: [&str; 3] = ["weight_packed", "weight_scale", "weight_shape"];

/// Side files by name; weights, their index and what a run adds aside.
fn side_files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().path());
    let named = entries.map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), p));
    let own = ["config.json", "vlmq_report.json", "README.md"];
    named
        .filter(|(name, _)| !name.contains(".safetensors") && !own.contains(&name.as_str()))
        .map(|(name, path)| (name, std::fs::read(path).unwrap()))
        .collect()
}

/// Everything that is not quantized is what it was; what is quantized has all its parts.
fn assert_same_but_quantized(home: &Home, spelling: Spelling, is_symmetric: bool) {
    let (source, written) = (read_tensors(&home.model()), read_tensors(&home.output()));
    let prefix = format!("{}.layers.", spelling.decoder());
    let mut n_quantized = 0;
    for (name, tensor) in &source {
        let module = name
            .strip_suffix(".weight")
            .filter(|m| m.ends_with("_proj"));
        let Some(module) = module.filter(|m| m.starts_with(&prefix)) else {
            assert_eq!(written.get(name), Some(tensor), "{name}");
            continue;
        };
        n_quantized += 1;
        assert!(!written.contains_key(name), "{name}");
        for suffix in PACKED {
            assert!(
                written.contains_key(&format!("{module}.{suffix}")),
                "{module}.{suffix}"
            );
        }
        assert_eq!(
            written[&format!("{module}.weight_scale")].dtype,
            spelling.dtype
        );
        let zero_point = written.contains_key(&format!("{module}.weight_zero_point"));
        assert_eq!(zero_point, !is_symmetric, "{module}");
    }
    assert_eq!(n_quantized, N_MODULES);
    assert_eq!(side_files(&home.model()), side_files(&home.output()));
    let config = |folder: &Path| json(&std::fs::read(folder.join("config.json")).unwrap());
    let mut changed = config(&home.output());
    let added = changed
        .as_object_mut()
        .unwrap()
        .shift_remove("quantization_config")
        .unwrap();
    assert_eq!(added["quant_method"], "compressed-tensors");
    assert_eq!(added["format"], "pack-quantized");
    assert_eq!(changed, config(&home.model()));
}

fn assert_report(report: &Value, method: &str, folder: &Path) {
    assert_eq!(report["method"], method);
    let file = json(&std::fs::read(folder.join("vlmq_report.json")).unwrap());
    assert_eq!(&file, report);
    let modules = report["modules"].as_array().unwrap();
    assert_eq!(modules.len(), N_MODULES);
    for module in modules {
        let loss = module["relative_loss"].as_f64();
        match method {
            "rtn" => assert_eq!(loss, None),
            _ => assert!(loss.is_some_and(|l| (0.0..1.0).contains(&l)), "{module}"),
        }
    }
    let uniform = report["deviations"].as_array().unwrap().iter();
    let uniform: Vec<&Value> = uniform.filter(|d| d["kind"] == "uniform_weights").collect();
    let n_expected = if method.starts_with("vlmq") { 4 } else { 0 };
    assert_eq!(
        uniform.len(),
        n_expected,
        "q, k, v and o of the first layer"
    );
    let is_first = |d: &&Value| d["layer_idx"] == 0 && d["reason"] == "vanishing_residual";
    assert!(uniform.iter().all(is_first), "{uniform:?}");
}

/// Inspects, asks and scores a written folder.
fn assert_usable(home: &Home, folder: &Path) {
    let run = |args: &[&str]| {
        let output = vlmq().args(args).arg("--json").output().unwrap();
        assert!(
            output.status.success(),
            "{args:?}: {}",
            text(&output.stderr)
        );
        let value = json(&output.stdout);
        assert_eq!(value["schema"], 1);
        assert_eq!(value["command"], args[0]);
        value
    };
    let folder = folder.to_str().unwrap();
    let inspect = run(&["inspect", folder]);
    assert_eq!(inspect["n_quantized_modules"], N_MODULES);
    let rows = inspect["schemes"].as_array().unwrap();
    for row in rows {
        // Of the seven linears of a layer all but down_proj have 64 columns.
        let misfits = row["misfits"].as_array().unwrap();
        let is_large = row["scheme"]["group_size"] == 128;
        assert_eq!(
            misfits.len(),
            if is_large { N_MODULES / 7 * 6 } else { 0 },
            "{row}"
        );
        assert_eq!(row["proposed_group_size"].is_null(), !is_large, "{row}");
    }
    let picture = home.data().join("2.png");
    let picture = picture.to_str().unwrap();
    let ask = [
        "generate",
        folder,
        "--image",
        picture,
        "--prompt",
        "how many?",
    ];
    let answer = run(&[&ask[..], &["--max-new-tokens", "3"]].concat());
    assert!(answer["output_ids"].as_array().unwrap().len() <= 3);
    let answers = home.path().join("answers");
    let (questions, model) = (home.questions(), home.model());
    let score = [
        "eval",
        folder,
        "--task",
        questions.to_str().unwrap(),
        "--limit",
        "4",
    ];
    let against = [
        "--reference",
        model.to_str().unwrap(),
        "--output",
        answers.to_str().unwrap(),
    ];
    let scores = run(&[&score[..], &against[..]].concat());
    let task = &scores["tasks"]["questions"];
    assert_eq!(task["accuracy"]["n"], 4);
    assert!(
        task["kl_per_answer_token"]
            .as_f64()
            .is_some_and(|kl| kl >= 0.0),
        "{task}"
    );
    let predictions = json(&std::fs::read(answers.join("predictions.json")).unwrap());
    assert_eq!(predictions["questions"].as_array().unwrap().len(), 4);
}

fn flow(spelling: Spelling, method: &str, flags: &[&str]) {
    let home = Home::new(spelling);
    let run = home.quantize(&[&["--json", "--method", method], flags].concat());
    assert!(run.status.success(), "{method}: {}", text(&run.stderr));
    let value = json(&run.stdout);
    assert_eq!(
        (&value["schema"], &value["command"]),
        (&1.into(), &"quantize".into())
    );
    assert_same_but_quantized(&home, spelling, flags.contains(&"--symmetric"));
    assert_report(&value["report"], method, &home.output());
    assert_usable(&home, &home.output());
    // Model, data, output, answers: nothing temporary is left beside them.
    assert_eq!(std::fs::read_dir(home.path()).unwrap().count(), 4);
}

#[test]
fn a_plain_model_by_rtn() {
    flow(
        Spelling::USUAL,
        "rtn",
        &["--bits", "2", "--group-size", "8"],
    );
}

#[test]
fn an_untied_f32_model_by_gptq() {
    let spelling = Spelling {
        dtype: Dtype::F32,
        is_tied: false,
        ..Spelling::USUAL
    };
    flow(spelling, "gptq", &["--bits", "8", "--symmetric"]);
}

#[test]
fn a_sharded_model_by_gptaq() {
    let spelling = Spelling {
        n_shards: 3,
        ..Spelling::USUAL
    };
    flow(spelling, "gptaq", &["--bits", "4", "--group-size", "64"]);
}

#[test]
fn a_model_with_new_names_by_vlmq_v1() {
    let spelling = Spelling {
        has_new_names: true,
        n_shards: 2,
        ..Spelling::USUAL
    };
    flow(spelling, "vlmq-v1", &["--bits", "3", "--group-size", "-1"]);
}

#[test]
fn an_untied_f16_model_by_vlmq_v2() {
    let spelling = Spelling {
        dtype: Dtype::F16,
        is_tied: false,
        has_new_names: true,
        n_shards: 1,
    };
    flow(spelling, "vlmq-v2", &["--bits", "2", "--symmetric"]);
}

#[test]
fn names_and_shards_do_not_change_the_codes() {
    let weights = |spelling: Spelling| {
        let home = Home::new(spelling);
        assert!(home.quantize(&["--bits", "3"]).status.success());
        let prefix = format!("{}.layers.", spelling.decoder());
        let tensors = read_tensors(&home.output()).into_iter();
        tensors
            .filter_map(|(name, t)| Some((name.strip_prefix(&prefix)?.to_owned(), t)))
            .collect::<BTreeMap<_, _>>()
    };
    let other = Spelling {
        has_new_names: true,
        n_shards: 2,
        ..Spelling::USUAL
    };
    assert!(weights(Spelling::USUAL) == weights(other));
}

#[test]
fn one_seed_writes_one_set_of_bytes() {
    let home = Home::new(Spelling::USUAL);
    let write = |name: &str, flags: &[&str]| {
        let output = home.path().join(name);
        let run = home.quantize_to(
            &output,
            &[&["--method", "vlmq-v2", "--bits", "3"], flags].concat(),
        );
        assert!(run.status.success(), "{}", text(&run.stderr));
        std::fs::read(output.join("model.safetensors")).unwrap()
    };
    let first = write("first", &["--seed", "5", "--threads", "1"]);
    assert!(
        first == write("again", &["--seed", "5", "--threads", "1"]),
        "runs differ"
    );
    assert!(
        first == write("threads", &["--seed", "5", "--threads", "3"]),
        "threads differ"
    );
    assert!(
        first != write("other", &["--seed", "6"]),
        "the seed has no effect"
    );
}

/// Every setting is taken, told in the report, and has an effect on the weights.
#[test]
fn every_setting_counts() {
    let home = Home::new(Spelling::USUAL);
    let write = |i: usize, set: &str| {
        let output = home.path().join(format!("out{i}"));
        let run = home.quantize_to(&output, &["--bits", "3", "--json", "--set", set]);
        assert!(run.status.success(), "{set}: {}", text(&run.stderr));
        let settings = json(&run.stdout)["report"]["settings"].take();
        (
            settings,
            std::fs::read(output.join("model.safetensors")).unwrap(),
        )
    };
    let (_, plain) = write(0, "alpha=0.25");
    for (i, (set, pointer, value)) in [
        ("dampening_frac=0.5", "/dampening_frac", Value::from(0.5)),
        ("alpha=0", "/alpha", 0.0.into()),
        ("act_order=false", "/act_order", false.into()),
        ("clip=mse", "/clip", "mse".into()),
        ("clip=none", "/clip", "none".into()),
        ("clip_power=1", "/clip_power", 1.0.into()),
        ("clip_norm=2", "/clip_norm", "2".into()),
        ("target=least_squares", "/target", "least_squares".into()),
        (
            "target=residual_stream",
            "/target",
            "residual_stream".into(),
        ),
        ("unit_gain=true", "/unit_gain", true.into()),
        ("importance_power=4", "/importance/power", 4.0.into()),
        ("importance_norm=rms", "/importance/norm", "rms".into()),
        ("importance_loss=layer", "/importance/loss", "layer".into()),
    ]
    .into_iter()
    .enumerate()
    {
        let (settings, weights) = write(i + 1, set);
        assert_eq!(settings.pointer(pointer), Some(&value), "{set}: {settings}");
        assert!(weights != plain, "{set} has no effect");
    }
}

#[test]
fn a_recipe_skips_mixes_and_tells_what_it_did_not_need() {
    let home = Home::new(Spelling::USUAL);
    let rules = home.data().join("recipe.toml");
    let toml = "[[rule]]\npattern = 'layers\\.1\\.self_attn'\nskip = true\n\
                [[rule]]\npattern = 'mlp'\nbits = 8\ngroup_size = 64\n\
                [[rule]]\npattern = 'experts'\nbits = 2\n";
    std::fs::write(&rules, toml).unwrap();
    let run = home.quantize(&["--bits", "3", "--json", "--recipe", rules.to_str().unwrap()]);
    assert!(run.status.success(), "{}", text(&run.stderr));
    let report = &json(&run.stdout)["report"];
    let kinds = |kind: &str| {
        let all = report["deviations"].as_array().unwrap().iter();
        all.filter(|d| d["kind"] == kind)
            .cloned()
            .collect::<Vec<_>>()
    };
    assert_eq!(kinds("skipped").len(), 4);
    assert_eq!(kinds("idle_rule").len(), 1);
    assert_eq!(kinds("idle_rule")[0]["pattern"], "experts");
    let (source, written) = (read_tensors(&home.model()), read_tensors(&home.output()));
    let skipped = "model.layers.1.self_attn.o_proj.weight";
    assert_eq!(written.get(skipped), source.get(skipped));
    let words = |module: &str| written[&format!("{module}.weight_packed")].shape[1];
    assert_eq!(words("model.layers.0.self_attn.q_proj"), 64 * 3 / 32);
    assert_eq!(words("model.layers.1.mlp.up_proj"), 64 * 8 / 32);
    assert_eq!(
        written["model.layers.1.mlp.down_proj.weight_scale"].shape,
        [64, 2]
    );
    let inspect = vlmq()
        .arg("inspect")
        .arg(home.output())
        .arg("--json")
        .output()
        .unwrap();
    assert_eq!(json(&inspect.stdout)["n_quantized_modules"], N_MODULES - 4);
}

/// What is predicted for the disk is what is written, to the byte of the formats' tensors.
#[test]
fn a_dry_run_predicts_and_writes_nothing() {
    let home = Home::new(Spelling::USUAL);
    for method in ["rtn", "vlmq-v2"] {
        let flags = ["--method", method, "--bits", "3", "--json"];
        let dry = home.quantize(&[&flags[..], &["--dry-run"]].concat());
        assert!(dry.status.success(), "{}", text(&dry.stderr));
        assert_eq!(
            std::fs::read_dir(home.path()).unwrap().count(),
            2,
            "model and data"
        );
        let plan = json(&dry.stdout);
        assert_eq!(plan["command"], "quantize --dry-run");
        assert_eq!(plan["n_modules"], N_MODULES);
        assert!(plan["peak_memory_bytes"].as_u64().unwrap() > 1 << 20);
        let run = home.quantize(&flags);
        let written = json(&run.stdout)["tensor_bytes"].as_f64().unwrap();
        // `weight_shape` and padding of packed words are not planned: a percent of this model.
        let planned = plan["disk_bytes"].as_f64().unwrap();
        assert!(
            (written / planned - 1.0).abs() < 0.02,
            "{written} written, {planned} planned"
        );
        std::fs::remove_dir_all(home.output()).unwrap();
    }
}

/// A sweep goes on where it was stopped: lines that it has are not measured again.
#[test]
fn a_sweep_is_resumed() {
    let home = Home::new(Spelling::USUAL);
    let sweep = home.path().join("sweep.toml");
    let toml = "model = 'model'\ncalibration = 'data'\ntasks = 'data/questions.jsonl'\n\
                samples = 3\nlimit = 3\nseeds = [0, 1]\nmethods = ['rtn', 'vlmq-v1']\n\
                bits = [3]\ngroup_sizes = [32]\n";
    std::fs::write(&sweep, toml).unwrap();
    let rows = home.path().join("rows.jsonl");
    let run = || {
        let mut command = vlmq();
        command
            .arg("compare")
            .arg(&sweep)
            .arg("--output")
            .arg(&rows)
            .arg("--json");
        command.output().unwrap()
    };
    let first = run();
    assert!(first.status.success(), "{}", text(&first.stderr));
    let found = json(&first.stdout);
    let methods: Vec<&str> = found["rows"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["method"].as_str().unwrap())
        .collect();
    assert_eq!(methods, ["original", "rtn", "vlmq-v1", "vlmq-v1"]);
    let all = std::fs::read_to_string(&rows).unwrap();
    let kept: String = all.lines().take(3).map(|l| format!("{l}\n")).collect();
    std::fs::write(&rows, &kept).unwrap();
    assert!(run().status.success());
    let again = std::fs::read_to_string(&rows).unwrap();
    assert!(again.starts_with(&kept));
    assert_eq!(again.lines().count(), 4);
    std::fs::write(&rows, format!("{kept}half a li")).unwrap();
    let damaged = run();
    assert_eq!(damaged.status.code(), Some(2));
    assert!(
        text(&damaged.stderr).contains("rows.jsonl: line 4"),
        "{}",
        text(&damaged.stderr)
    );
}

/// Variants run under their own names, and each is set beside the baseline seed by seed.
#[test]
fn a_sweep_has_variants() {
    let home = Home::new(Spelling::USUAL);
    let sweep = home.path().join("sweep.toml");
    let compare = |variants: &str| {
        let toml = format!(
            "model = 'model'\ncalibration = 'data'\ntasks = 'data/questions.jsonl'\n\
             samples = 3\nskip = 1\nlimit = 2\nseeds = [0, 1]\nmethods = ['gptq']\n\
             bits = [3]\ngroup_sizes = [-1]\n{variants}"
        );
        std::fs::write(&sweep, toml).unwrap();
        let rows = home.path().join("rows.jsonl");
        let _ = std::fs::remove_file(&rows);
        let mut command = vlmq();
        command.arg("compare").arg(&sweep);
        command.arg("--output").arg(&rows).arg("--json");
        command.output().unwrap()
    };
    let variant = |name: &str, set: &str| {
        format!("[[variant]]\nname = '{name}'\nmethod = 'gptaq'\nset = [{set}]\n")
    };
    let shifted = variant(
        "shifted",
        "'target=residual_stream', 'alpha=held_out', 'clip=mse'",
    );
    let tuned = variant("tuned", "'tune_steps=1', 'tune_samples=4'");
    let run = compare(&(shifted + &tuned));
    assert!(run.status.success(), "{}", text(&run.stderr));
    let found = json(&run.stdout);
    let rows = found["rows"].as_array().unwrap();
    let named = |name: &'static str| rows.iter().filter(move |r| r["method"] == name);
    assert_eq!((named("gptq").count(), named("shifted").count()), (2, 2));
    assert!(named("tuned").all(|r| r["tuning"]["n_samples"].as_u64() > Some(0)));
    assert!(named("shifted").all(|r| r["tuning"].is_null()));
    assert!(named("shifted").all(|r| r["group_size"].is_null() && r["bits"] == 3));
    assert_eq!(rows[1]["tasks"]["questions"]["n"], 2);
    let pair = &found["paired"][0];
    assert_eq!(
        (&pair["method"], &pair["baseline"]),
        (&"shifted".into(), &"gptq".into())
    );
    assert_eq!(pair["n_pairs"], 2);
    assert!(
        pair["kl_ratio"]["bounds"]
            .as_array()
            .is_some_and(|b| b.len() == 2)
    );
    let refused = |variants: &str, why: &str| {
        let run = compare(variants);
        assert_eq!(run.status.code(), Some(2));
        assert!(text(&run.stderr).contains(why), "{}", text(&run.stderr));
    };
    refused(&variant("gptq", ""), "another one has this name");
    refused(&variant("swept", "'sweeps=1'"), "target=least_squares");
    let more = variant("more", "'tune_steps=1', 'tune_samples=99'");
    refused(&more, "--samples 99");
}

/// As in `vlmq … | head`: the work is done whether or not somebody reads on.
#[test]
fn nobody_has_to_listen_to_the_end() {
    let home = Home::new(Spelling::USUAL);
    let mut command = vlmq();
    command.args(["-v", "quantize"]).arg(home.model());
    command.arg("--calibration").arg(home.data());
    command.arg("--output").arg(home.output());
    command.args(["--samples", "2", "--group-size", "32"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert!(child.wait().unwrap().success());
    assert!(home.output().join("config.json").exists());
}

/// AWQ changes norms, tells which, and nothing else than the linears beside them; and where codes
/// are fine, the model stays what it was, as no fold could leave it that is not undone elsewhere.
#[test]
fn awq_folds_its_scales_into_norms() {
    let home = Home::new(Spelling::USUAL);
    let mut command = vlmq();
    command.arg("quantize").arg(home.model());
    command.arg("--calibration").arg(home.data());
    command.arg("--output").arg(home.output());
    command.args(["--samples", "4", "--group-size", "32", "--bits", "3"]);
    let run = command
        .args(["--method", "awq", "--json"])
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", text(&run.stderr));
    let report = json(&run.stdout)["report"].take();
    let named = |key: &str| -> Vec<String> {
        let entries = report[key].as_array().unwrap().iter();
        entries
            .map(|c| c["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let changed = named("changed");
    assert!(!changed.is_empty());
    let (source, written) = (read_tensors(&home.model()), read_tensors(&home.output()));
    for (name, tensor) in &source {
        if let Some(found) = written.get(name) {
            assert_eq!(changed.contains(name), found != tensor, "{name}");
            assert_eq!((found.dtype, &found.shape), (tensor.dtype, &tensor.shape));
            assert!(found == tensor || name.contains("layernorm"), "{name}");
        }
    }
    // Grouped queries leave three searches in each layer.
    assert_eq!(
        report["scales"].as_array().unwrap().len(),
        N_MODULES / 7 * 3
    );
    let deviations = report["deviations"].as_array().unwrap();
    let not_scaled = deviations.iter().filter(|d| d["kind"] == "not_scaled");
    assert_eq!(not_scaled.count(), N_MODULES / 7);
    assert_usable(&home, &home.output());
}

#[test]
fn awq_and_mbq_keep_the_function_of_the_model() {
    let home = Home::new(Spelling::USUAL);
    let sweep = home.path().join("sweep.toml");
    let toml = "model = 'model'\ncalibration = 'data'\ntasks = 'data/questions.jsonl'\n\
                samples = 3\nseeds = [0]\nmethods = ['rtn', 'awq', 'mbq']\n\
                bits = [8]\ngroup_sizes = [32]\n";
    std::fs::write(&sweep, toml).unwrap();
    let mut command = vlmq();
    command.arg("compare").arg(&sweep).arg("--json");
    let run = command.arg("--output").arg(home.path().join("rows.jsonl"));
    let run = run.output().unwrap();
    assert!(run.status.success(), "{}", text(&run.stderr));
    let rows = json(&run.stdout)["rows"].take();
    let kl = |i: usize| rows[i]["tasks"]["questions"]["kl"].as_f64().unwrap();
    for i in [2, 3] {
        assert!(kl(i) < 2.0 * kl(1), "{i}: {} {}", kl(i), kl(1));
    }
    assert_eq!(rows[3]["method"], "mbq");
    assert_ne!(kl(2), kl(3));
}

/// With one sample nothing is held out: no drift is corrected, and every module says so. With two
/// there is.
#[test]
fn alpha_is_found_where_something_is_held_out() {
    let home = Home::new(Spelling::USUAL);
    let run = |n_samples: &str| {
        let output = home.output().with_file_name(format!("of-{n_samples}"));
        let mut command = vlmq();
        command.arg("quantize").arg(home.model());
        command.arg("--calibration").arg(home.data());
        command.args(["--bits", "3", "--group-size", "32", "--json"]);
        command.args(["--samples", n_samples, "--output"]);
        let run = command.arg(&output).output().unwrap();
        assert!(run.status.success(), "{}", text(&run.stderr));
        let report = json(&run.stdout)["report"].take();
        let all = |key: &str| report[key].as_array().unwrap().clone();
        let deviations = all("deviations");
        let unjudged = deviations.iter().filter(|d| d["kind"] == "unjudged_alpha");
        let alphas = all("modules");
        let alphas = alphas.iter().map(|m| m["alpha"].as_f64().unwrap());
        (unjudged.count(), alphas.collect::<Vec<f64>>())
    };
    let (n_unjudged, alphas) = run("1");
    assert_eq!(n_unjudged, alphas.len());
    assert!(alphas.iter().all(|a| *a == 0.0), "{alphas:?}");
    let (n_unjudged, alphas) = run("2");
    assert_eq!(n_unjudged, 0);
    assert!(alphas.iter().all(|a| (0.0..=1.0).contains(a)), "{alphas:?}");
    assert!(alphas.iter().any(|a| *a > 0.0), "{alphas:?}");
}
