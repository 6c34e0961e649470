package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/cni/plugin"
	"github.com/fairlead-mesh/fairlead/internal/netns"
)

const ambient = modeLabel + ": " + modeAmbient

func TestPodStartsInTheMesh(t *testing.T) {
	n := newNode(t)
	proxy, _ := n.proxy()
	in, out := n.pod("in", 1, ambient), n.pod("out", 2, "")
	n.object(in, ambient, false) // as at a real start: the address is not known to Kubernetes yet
	n.object(out, "", false)
	if answer := n.add(in); !answer.Redirected {
		t.Errorf("labelled pod: %+v", answer)
	}
	if answer := n.add(out); answer.Redirected {
		t.Errorf("pod without label: %+v", answer)
	}
	n.expect(in, "proxy")
	n.expect(out, "out")
	w, ok := proxy.workload(in.uid)
	if !ok || w.Name != "in" || w.Namespace != "app" || w.ServiceAccount != "sa-of-in" {
		t.Errorf("the proxy was told of %+v", w)
	}
	if _, err := n.call(http.MethodPost, plugin.CheckPath, in.event()); err != nil {
		t.Errorf("check: %v", err)
	}
	// Another sandbox's end changes nothing; its own does.
	for _, tc := range []struct{ container, want string }{{"other", "proxy"}, {"container-in", "out"}} {
		body := strings.Replace(in.event(), "container-in", tc.container, 1)
		if _, err := n.call(http.MethodPost, plugin.DelPath, body); err != nil {
			t.Errorf("del: %v", err)
		}
		n.expect(in, tc.want)
	}
	if _, ok := proxy.workload(in.uid); ok {
		t.Error("the proxy still has the deleted pod")
	}
}

// An agent whose port somebody else has says so and ends, so that it is started again.
func TestAgentEndsWhenItCannotListen(t *testing.T) {
	n := newNode(t)
	n.stop()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for _, listener := range []string{"health", "metrics"} {
		cfg := n.cfg
		if listener == "health" {
			cfg.HealthAddr = taken.Addr().String()
		} else {
			cfg.MetricsAddr = taken.Addr().String()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		err := Run(ctx, cfg, zap.NewNop())
		if !errors.Is(err, syscall.EADDRINUSE) || ctx.Err() != nil {
			t.Errorf("with the address for %s taken, it ended with %v, %v", listener, err, ctx.Err())
		}
		cancel()
	}
}

func TestStartFailsWithoutTheProxysWord(t *testing.T) {
	n := newNode(t)
	p := n.pod("in", 1, ambient)
	n.object(p, ambient, false)
	// Not 503: the plugin would ask others whether the pod is of the mesh.
	_, err := n.call(http.MethodPost, plugin.AddPath, p.event())
	if err == nil || !strings.HasPrefix(err.Error(), "500 ") || !strings.Contains(err.Error(), "no node proxy is connected") {
		t.Errorf("without a proxy: %v", err)
	}
	proxy, _ := n.proxy()
	proxy.refuse = true
	if _, err := n.call(http.MethodPost, plugin.AddPath, p.event()); err == nil || !strings.Contains(err.Error(), "it says no") {
		t.Errorf("with a proxy that refuses: %v", err)
	}
	n.expect(p, "out") // it has no containers, and its sandbox is about to go
	proxy.mu.Lock()
	proxy.refuse = false
	proxy.mu.Unlock()
	if answer := n.add(p); !answer.Redirected {
		t.Errorf("at last: %+v", answer)
	}
	n.expect(p, "proxy")
}

func TestLabelsTakeRunningPodsInAndOut(t *testing.T) {
	n := newNode(t)
	proxy, _ := n.proxy()
	p, stays := n.pod("web", 1, ""), n.pod("stays", 2, modeLabel+": none")
	n.add(p)
	n.add(stays)
	n.expect(p, "out")
	n.namespace("app", modeAmbient)
	n.expectSoon(p, "proxy")
	n.expect(stays, "out")

	conn, err := netns.Dial(t.Context(), p.ns, netns.DialOptions{}, far)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	atProxy := proxy.last(n, addrPort(conn.LocalAddr()))
	n.namespace("app", "")
	n.expectSoon(p, "out")
	if _, err := conn.Write([]byte("still")); err != nil {
		t.Errorf("a connection that was open: %v", err)
	}
	buf := make([]byte, 5)
	atProxy.SetReadDeadline(time.Now().Add(3 * time.Second))
	if _, err := io.ReadFull(atProxy, buf); err != nil || string(buf) != "still" {
		t.Errorf("a connection that was open brought %q: %v", buf, err)
	}
	n.object(p, ambient, true)
	n.expectSoon(p, "proxy")
	n.object(p, modeLabel+": none", true)
	n.expectSoon(p, "out")
}

func TestPodOlderThanTheAgentIsFound(t *testing.T) {
	n := newNode(t)
	n.proxy()
	byProcess, byFile := n.pod("by-process", 1, ""), n.pod("by-file", 2, "")
	// A process of the pod, in its namespace and in a cgroup that is named after it as the kubelet does.
	group := filepath.Join(n.cfg.Cgroup, "kubepods", "pod"+strings.ReplaceAll(byProcess.uid, "-", "_"))
	if err := os.MkdirAll(group, 0o755); err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(group)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL}
	if err := netns.Do(byProcess.ns, cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		os.Remove(group)
		os.Remove(filepath.Dir(group))
	})
	if err := os.Mkdir(n.cfg.NetnsDir, 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(n.cfg.NetnsDir, "cni-1")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(nsPath(byFile.ns), file, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(file, unix.MNT_DETACH) })
	n.namespace("app", modeAmbient)
	n.expectSoon(byProcess, "proxy")
	n.expectSoon(byFile, "proxy")
}

func TestFailsClosedAcrossRestarts(t *testing.T) {
	n := newNode(t)
	_, stopProxy := n.proxy()
	p := n.pod("web", 1, ambient)
	n.add(p)
	n.expect(p, "proxy")
	n.stop()
	n.expect(p, "proxy") // the agent is away
	stopProxy()
	n.expect(p, "refused") // and so is the proxy
	n.run()
	n.expect(p, "refused")
	proxy, _ := n.proxy()
	n.expectSoon(p, "proxy")
	if w, ok := proxy.workload(p.uid); !ok || w.Name != "web" {
		t.Errorf("the new proxy was told of %+v", w)
	}
	// What the agent remembers is lost, and the kernel still knows.
	n.stop()
	if err := os.RemoveAll(filepath.Join(n.cfg.RunDir, "pods")); err != nil {
		t.Fatal(err)
	}
	n.run()
	n.expect(p, "proxy")
	// A pod that went while the agent was away is forgotten.
	n.stop()
	if err := os.Remove(filepath.Join(n.dir, "pod-web.yaml")); err != nil {
		t.Fatal(err)
	}
	n.run()
	n.expectSoon(p, "out")
	n.eventually("the proxy forgets the pod", func() error {
		if _, ok := proxy.workload(p.uid); ok {
			return errors.New("it still has it")
		}
		return nil
	})
}

func TestUninstallLeavesNothing(t *testing.T) {
	n := newNode(t)
	n.proxy()
	p := n.pod("web", 1, ambient)
	n.add(p)
	n.stop()
	n.cfg.Record, n.cfg.PluginAccess = filepath.Join(n.cfg.RunDir, "mesh.json"), filepath.Join(n.cfg.RunDir, "access.json")
	for _, path := range []string{n.cfg.Record, n.cfg.PluginAccess, filepath.Join(n.cfg.RunDir, "held", "u-1")} {
		if err := writeDurably(path, []byte("{}")); err != nil {
			t.Fatal(err)
		}
	}
	if err := Uninstall(n.cfg, zap.NewNop()); err != nil {
		t.Fatal(err)
	}
	n.expect(p, "out")
	err := netns.Do(p.ns, func() error {
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			rules, err := netlink.RuleList(family)
			if err != nil {
				return err
			}
			for _, r := range rules {
				if r.Mark != 0 {
					t.Errorf("left: %v", r)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(n.cfg.RunDir)
	if err != nil || len(left) != 0 {
		t.Errorf("left in the run directory: %v, %v", left, err)
	}
}

func TestHostileEvents(t *testing.T) {
	n := newNode(t)
	n.proxy()
	p := n.pod("web", 1, ambient)
	host, err := netns.Open(n.cfg.HostNetns)
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	for name, body := range map[string]string{
		"not JSON":                     "GET / HTTP/1.0",
		"too long":                     `{"PodName":"` + strings.Repeat("a", plugin.MaxEvent) + `"}`,
		"the host's network namespace": strings.Replace(p.event(), nsPath(p.ns), nsPath(host), 1),
		"another kind of namespace":    strings.Replace(p.event(), nsPath(p.ns), "/proc/self/ns/uts", 1),
		"a file":                       strings.Replace(p.event(), nsPath(p.ns), "/etc/passwd", 1),
		"no addresses":                 strings.Replace(p.event(), p.ip.String()+"/32", "", 1),
		"another pod's UID":            strings.Replace(p.event(), p.uid, "uid-of-other", 1),
	} {
		t.Run(name, func(t *testing.T) {
			if answer, err := n.call(http.MethodPost, plugin.AddPath, body); err == nil {
				t.Errorf("answered %+v", answer)
			}
		})
	}
	if answer := n.add(p); !answer.Redirected {
		t.Errorf("afterwards: %+v", answer)
	}
	info, err := os.Stat(n.cfg.EventSocket)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the socket's mode: %v, %v", info, err)
	}
}

func TestManyPodsStartAtOnce(t *testing.T) {
	n := newNode(t)
	proxy, _ := n.proxy()
	var pods []*pod
	for i := range byte(100) {
		p := n.pod(fmt.Sprintf("web-%d", i), i+1, ambient)
		n.object(p, ambient, false)
		pods = append(pods, p)
	}
	took := make([]time.Duration, len(pods))
	var group sync.WaitGroup
	for i, p := range pods {
		group.Go(func() {
			start := time.Now()
			if answer, err := n.call(http.MethodPost, plugin.AddPath, p.event()); err != nil || !answer.Redirected {
				t.Errorf("%s: %+v, %v", p.name, answer, err)
			}
			took[i] = time.Since(start)
		})
	}
	group.Wait()
	slices.Sort(took)
	t.Logf("from the request to the proxy's word: median %v, slowest %v", took[len(took)/2], took[len(took)-1])
	for _, p := range pods {
		n.expect(p, "proxy")
		if _, ok := proxy.workload(p.uid); !ok {
			t.Errorf("the proxy was not told of %s", p.name)
		}
	}
}
