//! The same tests with every runtime handler: what runs a container does not show.

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt as _, path::Path};

use anyhow::{Context as _, Result};
use longshore_proto::cri::v1 as cri;
use longshore_tests::{
    host,
    pods::{self, Bench, container, pod, script},
    skip,
};
use tonic::Code;

/// Runs a test with pods of another handler, if that is here and says that it has what is needed.
fn with(handler: &'static str, needs: &str, name: &str, test: fn() -> Result<()>) -> Result<()> {
    if !host::can_run(handler, &["--version"]) {
        skip(name, &format!("{handler} is not installed"));
        return Ok(());
    }
    if !needs.is_empty() && !features(handler)?.contains(needs) {
        skip(
            name,
            &format!("this {handler} does not say that it has {needs}"),
        );
        return Ok(());
    }
    pods::with_handler(handler, test)
}

/// What a runtime says of itself; nothing where it is too old for that.
fn features(handler: &str) -> Result<String> {
    let said = std::process::Command::new(handler)
        .arg("features")
        .output()?;
    Ok(String::from_utf8_lossy(&said.stdout).into_owned())
}

macro_rules! with_handler {
    ($module:ident, $handler:ident, $needs:literal, $($file:ident::$test:ident)*) => {
        mod $module {
            $(
                #[test]
                fn $test() -> anyhow::Result<()> {
                    let name = concat!(stringify!($handler), "::", stringify!($test));
                    super::with(stringify!($handler), $needs, name, crate::$file::$test)
                }
            )*
        }
    };
}

macro_rules! with_all_handlers {
    ($($file:ident::$test:ident)*) => {
        with_handler!(runc, runc, "", $($file::$test)*);
        with_handler!(crun, crun, "", $($file::$test)*);
    };
}

macro_rules! with_user_namespaces {
    ($($file:ident::$test:ident)*) => {
        with_handler!(mapped_by_runc, runc, "\"user\"", $($file::$test)*);
        with_handler!(mapped_by_crun, crun, "\"user\"", $($file::$test)*);
    };
}

with_user_namespaces! {
    user_namespaces::root_of_a_pod_is_root_inside_and_nobody_outside
    user_namespaces::volumes_are_mapped_only_where_that_is_asked
    user_namespaces::what_comes_from_images_has_the_owners_that_it_has_there
    user_namespaces::users_terminals_and_limits_are_those_of_the_namespace
    user_namespaces::a_killed_agent_finds_the_pod_again
}

with_all_handlers! {
    lifecycle::a_container_goes_through_its_states
    lifecycle::exits_have_exact_codes_and_reasons
    lifecycle::what_cannot_start_says_why
    lifecycle::command_and_args_follow_the_table
    lifecycle::exec_sync_tells_output_and_code
    lifecycle::an_exec_whose_caller_leaves_ends
    lifecycle::an_exec_timeout_ends_everything_it_started
    lifecycle::an_exec_is_confined_like_the_first_process
    lifecycle::capabilities_are_added_and_dropped
    lifecycle::the_default_seccomp_profile_filters
    lifecycle::users_and_groups_follow_the_image_and_the_request
    lifecycle::the_root_can_be_read_only_and_paths_masked
    lifecycle::mounts_land_where_they_should
    lifecycle::mount_propagation_goes_the_way_it_is_told
    lifecycle::devices_appear_only_when_asked_for
    lifecycle::pid_and_ipc_namespaces_are_shared_as_asked
    lifecycle::a_container_can_join_the_pids_of_another
    lifecycle::sysctls_and_the_hostname_are_the_pods_own
    lifecycle::limits_reach_the_kernel_and_can_change
    lifecycle::want_of_memory_is_named
    lifecycle::a_stop_is_gentle_first
    lifecycle::logs_are_cut_joined_and_rotated_exactly
    lifecycle::a_terminal_is_a_terminal
    lifecycle::a_privileged_container_may_do_all
    lifecycle::stats_tell_what_is_used
    lifecycle::a_lost_shim_loses_its_pod_alone
    crash::pods_live_through_the_death_of_the_agent
    crash::a_kill_in_the_middle_leaves_all_or_nothing
}

const INSTALLED: [&str; 2] = ["runc", "crun"];

fn installed() -> impl Iterator<Item = &'static str> {
    INSTALLED
        .into_iter()
        .filter(|name| host::can_run(name, &["--version"]))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_node_lists_its_handlers_and_refuses_others_by_their_names() -> Result<()> {
    let mut bench = Bench::start().await?;
    let status = bench
        .runtime
        .status(cri::StatusRequest::default())
        .await?
        .into_inner();
    let listed: BTreeSet<_> = status
        .runtime_handlers
        .iter()
        .map(|handler| handler.name.as_str())
        .collect();
    let expected: BTreeSet<_> = ["", "native"].into_iter().chain(installed()).collect();
    assert_eq!(listed, expected);
    for handler in &status.runtime_handlers {
        let told = handler.features.context("features")?;
        // The engine can always; of a runtime, what it says itself.
        let own = ["", "native"].contains(&&*handler.name);
        let says = |what| Ok::<_, anyhow::Error>(own || features(&handler.name)?.contains(what));
        let name = &handler.name;
        assert_eq!(told.recursive_read_only_mounts, says("\"rro\"")?, "{name}");
        assert_eq!(told.user_namespaces, says("\"user\"")?, "{name}");
    }
    let refused = bench
        .runtime
        .run_pod_sandbox(cri::RunPodSandboxRequest {
            config: Some(pod("refused")),
            runtime_handler: "kata-of-mine".to_owned(),
        })
        .await
        .expect_err("unknown");
    assert_eq!(refused.code(), Code::InvalidArgument);
    for name in expected.iter().filter(|name| !name.is_empty()) {
        assert!(refused.message().contains(name), "{refused:?}");
    }
    bench.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_keeps_its_handler_and_says_so() -> Result<()> {
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    for handler in installed() {
        let pod = pods::with_handler_async(handler, bench.run(pod(handler))).await?;
        let id = bench
            .launch(&pod, container("main", &toolbox, &["sleep", "10000"]))
            .await?;
        bench.crash().await?;
        assert_eq!(bench.pod_status(&pod).await?.runtime_handler, handler);
        let listed = bench
            .runtime
            .list_pod_sandbox(cri::ListPodSandboxRequest::default())
            .await?
            .into_inner();
        let listed = listed.items.iter().find(|one| one.id == pod.id);
        assert_eq!(listed.context("listed")?.runtime_handler, handler);
        // The runtime's own record of it is in the container's directory, and nowhere else.
        let state = bench
            .node
            .run_dir()
            .join("sandboxes")
            .join(&pod.id)
            .join("containers")
            .join(&id)
            .join("state")
            .join(&id);
        assert!(state.is_dir(), "{}", state.display());
        assert_eq!(bench.exec_ok(&id, "echo back").await?, "back\n");
        bench.stop_container(&id, 0).await?;
        bench.remove_container(&id).await?;
        bench.remove(&pod).await?;
    }
    bench.finish().await
}

/// All that the kernel tells of the rights of a process, of the first one and of an exec.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rights_are_the_same_with_every_handler() -> Result<()> {
    const RIGHTS: &str = "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:|SigBlk)' \
        /proc/self/status; umask; ulimit -n; cat /proc/self/oom_score_adj; \
        ls /proc/self/fd | wc -l; echo end";
    let mut bench = Bench::start().await?;
    let toolbox = bench.toolbox.clone();
    let mut seen = Vec::new();
    for handler in ["native"].into_iter().chain(installed()) {
        let pod = pods::with_handler_async(handler, bench.run(pod(handler))).await?;
        for restricted in [false, true] {
            let text = format!("{RIGHTS}; sleep 10000");
            let mut config = script(&format!("c{}", u8::from(restricted)), &toolbox, &text);
            let security = pods::security(&mut config);
            security.no_new_privs = restricted;
            if restricted {
                security.run_as_user = Some(cri::Int64Value { value: 1000 });
                security.supplemental_groups = vec![7, 9];
            }
            let id = bench.launch(&pod, config).await?;
            let log = bench.status(&id).await?.log_path;
            let log = Path::new(&log);
            pods::wait_for("the rights in the log", async || {
                Ok(pods::read_log(log).is_ok_and(|log| log.stdout().ends_with("end\n")))
            })
            .await?;
            let first = pods::read_log(log)?.stdout();
            let exec = bench.exec_ok(&id, RIGHTS).await?;
            seen.push((handler, restricted, first, exec));
        }
        bench.remove(&pod).await?;
    }
    for (handler, restricted, first, exec) in &seen {
        let (_, _, expected_first, expected_exec) = seen
            .iter()
            .find(|(_, same, ..)| same == restricted)
            .context("native came first")?;
        assert_eq!(first, expected_first, "first process with {handler}");
        assert_eq!(exec, expected_exec, "exec with {handler}");
    }
    bench.finish().await
}

/// A runtime that never comes back from `create`: it is given half a minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hanging_runtime_holds_its_own_pod_only() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let program = dir.path().join("hangs");
    fs::write(&program, "#!/bin/sh\nsleep 100000 &\nwait\n")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let config = format!("[handlers.hangs]\npath = '{}'\n", program.display());
    let mut bench = Bench::start_configured(&config).await?;
    let toolbox = bench.toolbox.clone();
    let stuck = pods::with_handler_async("hangs", bench.run(pod("stuck"))).await?;
    let mut request = tonic::Request::new(cri::CreateContainerRequest {
        pod_sandbox_id: stuck.id.clone(),
        config: Some(container("main", &toolbox, &["true"])),
        sandbox_config: Some(stuck.config.clone()),
    });
    request.set_timeout(std::time::Duration::from_secs(10));
    bench
        .runtime
        .create_container(request)
        .await
        .expect_err("it hangs");
    let other = bench.run(pod("other")).await?;
    let (status, _) = bench.run_script(&other, "exit 3").await?;
    assert_eq!(status.exit_code, 3);
    bench.remove(&stuck).await?;
    bench.finish().await
}
