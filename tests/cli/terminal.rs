//! What the program says, and what a package is made of besides it.

use super::{quantize, repository, text, vlmq};

/// Every command that `vlmq help` lists.
fn commands() -> Vec<String> {
    let help = vlmq().arg("help").output().unwrap();
    let help = text(&help.stdout).to_string();
    let listed = help.split("Commands:").nth(1).unwrap();
    let listed = listed.split("Options:").next().unwrap();
    let names = listed
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    let names: Vec<String> = names.map(str::to_owned).filter(|n| n != "help").collect();
    assert!(names.len() > 10, "{names:?}");
    names
}

#[test]
fn shells_complete_every_command() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let done = vlmq().args(["completions", shell]).output().unwrap();
        assert_eq!(done.status.code(), Some(0));
        let script = text(&done.stdout).to_string();
        for command in commands() {
            assert!(script.contains(&command), "{shell}: {command}");
        }
        assert!(script.contains("group-size"), "{shell}");
    }
    let other = vlmq().args(["completions", "dos"]).output().unwrap();
    assert_eq!(other.status.code(), Some(2));
}

#[test]
fn every_command_has_a_manual_page() {
    let home = tempfile::tempdir().unwrap();
    let folder = home.path().join("pages");
    let mut command = vlmq();
    let done = command.arg("man").arg("--output").arg(&folder).output();
    assert_eq!(done.unwrap().status.code(), Some(0));
    for command in commands() {
        let path = folder.join(format!("vlmq-{command}.1"));
        let page = std::fs::read_to_string(&path).unwrap();
        assert!(
            page.contains(".SH NAME") && page.contains(".SH SYNOPSIS"),
            "{command}"
        );
    }
    let whole = vlmq().arg("man").output().unwrap();
    let main = std::fs::read_to_string(folder.join("vlmq.1")).unwrap();
    assert!(text(&whole.stdout).contains(".TH vlmq 1") && main.contains(".TH vlmq 1"));
    std::fs::write(home.path().join("file"), "").unwrap();
    let mut command = vlmq();
    let blocked = command
        .arg("man")
        .arg("--output")
        .arg(home.path().join("file/in"));
    let blocked = blocked.output().unwrap();
    assert_eq!(blocked.status.code(), Some(2));
    assert!(text(&blocked.stderr).contains("hint: "));
}

#[test]
fn a_quiet_run_says_nothing_but_errors() {
    let home = tempfile::tempdir().unwrap();
    let model = repository("testbed/model");
    let loud = quantize(&model, &home.path().join("loud"), &["--method", "rtn"]);
    assert!(text(&loud.stderr).contains("layer 4 of 4"));
    // Plain where nobody looks: no colours and no bars.
    assert!(!text(&loud.stderr).contains('\u{1b}'));
    let output = home.path().join("quiet");
    let quiet = quantize(&model, &output, &["--method", "rtn", "--quiet"]);
    assert_eq!(
        (quiet.status.code(), text(&quiet.stderr).as_ref()),
        (Some(0), "")
    );
    let again = quantize(&model, &output, &["--method", "rtn", "-q"]);
    assert_eq!(again.status.code(), Some(2));
    assert!(text(&again.stderr).starts_with("error: "));
    let both = vlmq().args(["inspect", "-q", "-v", "x"]).output().unwrap();
    assert_eq!(both.status.code(), Some(2));
}
