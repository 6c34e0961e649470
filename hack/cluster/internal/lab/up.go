package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/cgroup"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/config"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/machine"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/network"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/pki"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/plan"
)

// NoLimitsName is the name under which the cluster command stands in for runc on
// nodes whose cgroups have no controllers (see package runc).
const NoLimitsName = "runc-nolimits"

// Up brings a cluster up: it builds what is missing, claims addresses, starts the
// machines, and waits until nodes and DNS are ready.
func (l Lab) Up(ctx context.Context, spec plan.Spec) error {
	if err := preflight(&spec); err != nil {
		return err
	}
	if c, err := load(l.dir(spec.Name)); err == nil && c.answers() {
		return l.already(c)
	}
	tools, err := l.Builder.Ensure(ctx)
	if err != nil {
		return err
	}
	unlock, err := l.lock(spec.Name)
	if err != nil {
		return err
	}
	defer unlock()
	if c, err := load(l.dir(spec.Name)); err == nil {
		return l.already(c)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	c, err := l.claim(Record{Spec: spec, Tools: tools})
	if err != nil {
		return err
	}
	u := &upper{cluster: c, lab: l, began: time.Now()}
	if err := u.bring(ctx); ctx.Err() != nil {
		return fmt.Errorf("stopped half way; hack/cluster.sh down --name %s removes what there is", spec.Name)
	} else if err != nil {
		return fmt.Errorf("%w\n%s\nLogs are in %s. hack/cluster.sh down --name %s removes what there is.",
			err, u.evidence(), filepath.Join(c.run, "log"), spec.Name)
	}
	fmt.Fprintf(l.Out, "Cluster %s is up: %d nodes, %s, kube-proxy %s, CNI %s.\n", spec.Name, spec.Nodes, spec.IPFamily, spec.ProxyMode, spec.CNI)
	fmt.Fprintf(l.Out, "To use it: eval \"$(hack/cluster.sh env --name %s)\"\n", spec.Name)
	return nil
}

// already answers a second "up".
func (l Lab) already(c cluster) error {
	again := fmt.Sprintf("hack/cluster.sh down --name %s, then up again", c.Spec.Name)
	for _, name := range c.plan.Machines() {
		if _, ok := machine.Find(c.machine(name)); !ok {
			return fmt.Errorf("cluster %s is there, but its machine %s does not run: %s", c.Spec.Name, name, again)
		}
	}
	if !c.answers() {
		return fmt.Errorf("cluster %s is there, but its API server is not ready: %s", c.Spec.Name, again)
	}
	fmt.Fprintf(l.Out, "Cluster %s is up already (%d nodes, %s). To use it: eval \"$(hack/cluster.sh env --name %s)\"\n", c.Spec.Name, c.Spec.Nodes, c.Spec.IPFamily, c.Spec.Name)
	return nil
}

// answers tells whether the API server is ready.
func (c cluster) answers() bool {
	_, err := c.kubectl(nil, "get", "--raw", "/readyz", "--request-timeout=5s")
	return err == nil
}

// preflight checks what would fail later with a worse message, and settles what
// the machine decides.
func preflight(spec *plan.Spec) error {
	groups, err := cgroup.Discover()
	if err != nil {
		return err
	}
	if spec.Cgroup == "" {
		spec.Cgroup = "v2"
		if groups.V1() {
			spec.Cgroup = "v1"
		}
	}
	if err := spec.Check(); err != nil {
		return err
	}
	var errs []error
	if _, ok := groups.V2(); !ok && spec.Cgroup == "v2" {
		errs = append(errs, errors.New("cgroup v2 is not mounted on this machine"))
	}
	if spec.Cgroup == "v1" && !groups.V1() {
		errs = append(errs, errors.New("this machine has cgroup v2 only; use --cgroup v2"))
	}
	tools := []string{"runc", "nsenter", "nft", "iptables"}
	for _, t := range tools {
		if _, err := exec.LookPath(t); err != nil {
			errs = append(errs, fmt.Errorf("%s is not installed; hack/prereq.sh installs or names what is missing", t))
		}
	}
	if spec.CNI == "bridge" && !bridgeFilter() {
		errs = append(errs, errors.New("the kernel does not show bridged packets to kube-proxy (module br_netfilter); use --cni ptp"))
	}
	if _, err := os.Stat("/proc/net/if_inet6"); err != nil && spec.IPFamily == "dual" {
		errs = append(errs, errors.New("this kernel has no IPv6; use --ip-family ipv4"))
	}
	return errors.Join(errs...)
}

// bridgeFilter tells whether packets between two ports of a bridge pass the packet
// filter; else a Service's answer from a pod on the caller's node is not translated
// back. Loading the module is all that can be done about it.
func bridgeFilter() bool {
	const setting = "/proc/sys/net/bridge/bridge-nf-call-iptables"
	if _, err := os.Stat(setting); err == nil {
		return true
	}
	_ = exec.Command("modprobe", "br_netfilter").Run()
	_, err := os.Stat(setting)
	return err == nil
}

// claim gives the cluster an index of its own and writes its record.
func (l Lab) claim(r Record) (cluster, error) {
	unlock, err := l.lock("index")
	if err != nil {
		return cluster{}, err
	}
	defer unlock()
	taken := map[int]bool{}
	for _, name := range l.Names() {
		if c, err := load(l.dir(name)); err == nil {
			taken[c.Spec.Index] = true
		}
	}
	groups, err := cgroup.Discover()
	if err != nil {
		return cluster{}, err
	}
	if groups.Exists(r.Spec.Name) {
		return cluster{}, fmt.Errorf("cgroups of a cluster %s exist: one of that name lives in another FAIRLEAD_STATE, or its directory was deleted while it ran; choose another name", r.Spec.Name)
	}
	routed, err := network.Routed()
	if err != nil {
		return cluster{}, err
	}
	if r.Spec.Index, err = plan.FreeIndex(r.Spec, taken, routed); err != nil {
		return cluster{}, err
	}
	c := cluster{Record: r, run: l.dir(r.Spec.Name)}
	if c.plan, err = plan.New(r.Spec); err != nil {
		return cluster{}, err
	}
	if c.Runc, err = runcPath(c); err != nil {
		return cluster{}, err
	}
	return c, c.save()
}

// runcPath is the runc of the nodes: the machine's, or the cluster command under
// another name where limits cannot be enforced.
func runcPath(c cluster) (string, error) {
	groups, err := cgroup.Discover()
	if err != nil {
		return "", err
	}
	if c.Spec.Cgroup == "v2" && !groups.Limits() {
		return filepath.Join(c.run, "bin", NoLimitsName), nil
	}
	return exec.LookPath("runc")
}

// upper is one cluster on its way up.
type upper struct {
	cluster
	lab   Lab
	began time.Time
	self  string
	cp    machine.Process
	watch []string // log files that may say why the current step fails
}

func (u *upper) step(format string, args ...any) {
	fmt.Fprintf(u.lab.Out, "%6.1f s  %s\n", time.Since(u.began).Seconds(), fmt.Sprintf(format, args...))
}

// bring has the order of events: machines first, since containerd takes its images
// while the API server starts.
func (u *upper) bring(ctx context.Context) error {
	if err := u.prepare(); err != nil {
		return err
	}
	if err := u.startControlPlane(); err != nil {
		return err
	}
	for _, n := range u.plan.Nodes {
		if err := u.startNode(n); err != nil {
			return err
		}
	}
	u.step("machines started")
	u.expect("control-plane-kube-apiserver", "control-plane-etcd", "control-plane")
	if err := u.poll(ctx, 3*time.Minute, "the API server to be ready", "get", "--raw", "/readyz"); err != nil {
		return err
	}
	u.step("API server ready at https://%s", netip.AddrPortFrom(u.plan.ControlPlane[0], 6443))
	if err := u.bootstrap(ctx); err != nil {
		return err
	}
	u.step("nodes ready")
	dns, err := config.CoreDNS(u.paths(), u.plan)
	if err != nil {
		return err
	}
	u.expect("node1-kubelet", "node1-containerd", "control-plane-kube-controller-manager")
	if _, err := u.kubectl(bytes.NewReader(dns), "apply", "-f", "-"); err != nil {
		return err
	}
	if _, err := u.kubectl(nil, "-n", "kube-system", "rollout", "status", "deploy/coredns", "--timeout=120s"); err != nil {
		return err
	}
	u.step("CoreDNS ready")
	return nil
}

// prepare makes the cluster's files and the copy of this command that its machines run.
func (u *upper) prepare() error {
	var addresses []netip.Addr
	addresses = append(append(append(addresses, u.plan.ControlPlane...), u.plan.APIService...), netip.MustParseAddr("127.0.0.1"))
	var nodes []string
	for _, n := range u.plan.Nodes {
		nodes = append(nodes, n.Name)
	}
	files, err := pki.Make(pki.Request{Cluster: u.Spec.Name, Server: u.plan.ControlPlane[0], Addresses: addresses, Nodes: nodes, Now: time.Now()})
	if err != nil {
		return err
	}
	if err := pki.Write(u.paths().PKI(), files); err != nil {
		return err
	}
	if u.self, err = installSelf(filepath.Join(u.run, "bin")); err != nil {
		return err
	}
	return u.lab.raiseInotify()
}

// installSelf copies this command, so that a rebuilt one changes no running
// machine, and links the name under which it stands in for runc.
func installSelf(dir string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	b, err := os.ReadFile(self)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	to := filepath.Join(dir, "cluster")
	if err := os.WriteFile(to, b, 0o755); err != nil {
		return "", err
	}
	return to, os.Symlink("cluster", filepath.Join(dir, NoLimitsName))
}

func (u *upper) startControlPlane() error {
	u.expect("control-plane")
	proc, goAhead, err := machine.Start(u.machine(plan.ControlPlane), u.self)
	if err != nil {
		return err
	}
	u.cp = proc
	if err := network.ControlPlane(u.plan, proc.PID); err != nil {
		return fmt.Errorf("wiring the control plane: %w", err)
	}
	return goAhead()
}

func (u *upper) startNode(n plan.Node) error {
	u.expect(n.Name)
	proc, goAhead, err := machine.Start(u.machine(n.Name), u.self)
	if err != nil {
		return err
	}
	if err := network.Node(u.plan, n, proc.PID, u.cp.PID); err != nil {
		return fmt.Errorf("wiring %s: %w", n.Name, err)
	}
	return goAhead()
}

// bootstrap makes the objects kubelets need, lets them start, and waits for them.
func (u *upper) bootstrap(ctx context.Context) error {
	objects, err := config.Bootstrap(u.paths(), u.plan)
	if err != nil {
		return err
	}
	if _, err := u.kubectl(bytes.NewReader(objects), "apply", "-f", "-"); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(u.run, machine.ReadyFile), nil, 0o644); err != nil {
		return err
	}
	u.expect("control-plane-kube-controller-manager")
	// Pods are refused until their namespace has its service account.
	if err := u.poll(ctx, time.Minute, "the controller manager", "-n", "default", "get", "serviceaccount", "default"); err != nil {
		return err
	}
	var logs []string
	for _, n := range u.plan.Nodes {
		logs = append(logs, n.Name+"-kubelet", n.Name)
	}
	u.expect(logs...)
	_, err = u.kubectl(nil, "wait", "--for=condition=Ready", "node", "--all", "--timeout=120s")
	return err
}

// poll repeats a kubectl command until it succeeds, as long as the machines live.
func (u *upper) poll(ctx context.Context, limit time.Duration, what string, args ...string) error {
	for deadline := time.Now().Add(limit); ; {
		_, err := u.kubectl(nil, args...)
		if err == nil {
			return nil
		}
		for _, name := range u.plan.Machines() {
			if _, ok := machine.Find(u.machine(name)); !ok {
				u.expect(name)
				return fmt.Errorf("machine %s died", name)
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("waited %v for %s: %w", limit, what, err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// expect names the logs that matter to the step that begins.
func (u *upper) expect(logs ...string) { u.watch = logs }

func (u *upper) evidence() string {
	var b strings.Builder
	for _, name := range u.watch {
		path := filepath.Join(u.run, "log", name+".log")
		if _, err := os.Stat(path); err != nil {
			continue
		}
		fmt.Fprintf(&b, "  The end of %s:\n%s\n", path, tail(path, 12))
	}
	return strings.TrimRight(b.String(), "\n")
}

const (
	inotifySetting = "/proc/sys/fs/inotify/max_user_instances"
	inotifyWanted  = 1024
)

func (l Lab) inotifyFile() string { return filepath.Join(l.State, "run", ".inotify-was") }

// raiseInotify raises the one setting of the whole machine that clusters need:
// 128 instances, the default, do for about two nodes. Down puts it back.
func (l Lab) raiseInotify() error {
	b, err := os.ReadFile(inotifySetting)
	if err != nil {
		return err
	}
	if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && n >= inotifyWanted {
		return nil
	}
	if err := os.WriteFile(l.inotifyFile(), b, 0o644); err != nil {
		return err
	}
	return os.WriteFile(inotifySetting, fmt.Appendf(nil, "%d", inotifyWanted), 0)
}

func (l Lab) restoreInotify() error {
	b, err := os.ReadFile(l.inotifyFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = os.WriteFile(inotifySetting, b, 0)
	}
	if err == nil {
		err = os.Remove(l.inotifyFile())
	}
	return err
}
