package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/fairlead-mesh/fairlead/bpf"
	"github.com/fairlead-mesh/fairlead/cni/plugin"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

var far = netip.MustParseAddrPort("192.0.2.1:80")

// node is a node with an agent in this process, which is the node proxy too.
type node struct {
	t    *testing.T
	cfg  Config
	dir  string // of Kubernetes objects
	stop func() // ends the agent, and waits for it
}

func newNode(t *testing.T) *node {
	t.Helper()
	testenv.RequireBPF(t)
	root, err := bpf.FindCgroup2("/proc/self/mounts")
	testenv.Require(t, err == nil, "a cgroup2 mount")
	dir := t.TempDir()
	n := &node{t: t, dir: filepath.Join(dir, "objects"), cfg: Config{
		NodeName: "node1", ConfigDir: filepath.Join(dir, "objects"),
		EventSocket: filepath.Join(dir, "run", "event.sock"), ZDSSocket: filepath.Join(dir, "run", "zds.sock"),
		RunDir: filepath.Join(dir, "run"), BPFFS: filepath.Join(dir, "bpf"),
		Cgroup: filepath.Join(root, fmt.Sprintf("fairlead-agent-test-%d", os.Getpid())),
		Proc:   "/proc", NetnsDir: filepath.Join(dir, "netns"), HostNetns: nsPath(testenv.Netns(t)),
		HealthAddr: "127.0.0.1:0", MetricsAddr: "127.0.0.1:0", ExcludeNamespaces: []string{"istio-system"},
		AckTimeout: 2 * time.Second,
	}}
	if err := os.Mkdir(n.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	n.joinCgroup(root)
	n.namespace("app", "")
	t.Cleanup(func() {
		if n.stop != nil {
			n.stop()
		}
		if err := Uninstall(n.cfg, zap.NewNop()); err != nil {
			t.Errorf("uninstall: %v", err)
		}
	})
	n.run()
	return n
}

// joinCgroup moves this process into a cgroup of the node for the time of the test.
func (n *node) joinCgroup(root string) {
	n.t.Helper()
	proxy := filepath.Join(n.cfg.Cgroup, "proxy")
	if err := os.MkdirAll(proxy, 0o755); err != nil {
		n.t.Fatal(err)
	}
	content, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		n.t.Fatal(err)
	}
	home := root
	for line := range strings.Lines(string(content)) {
		if rest, ok := strings.CutPrefix(line, "0::"); ok {
			home = filepath.Join(root, strings.TrimSpace(rest))
		}
	}
	pid := []byte(strconv.Itoa(os.Getpid()))
	if err := os.WriteFile(filepath.Join(proxy, "cgroup.procs"), pid, 0); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		if err := os.WriteFile(filepath.Join(home, "cgroup.procs"), pid, 0); err != nil {
			n.t.Error(err)
		}
		os.Remove(proxy)
		os.Remove(n.cfg.Cgroup)
	})
}

// run starts the agent and waits until it is ready.
func (n *node) run() {
	n.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, n.cfg, zaptest.NewLogger(n.t, zaptest.Level(zap.WarnLevel))) }()
	n.stop = func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("agent: %v", err)
		}
		n.stop = nil
	}
	n.eventually("the agent is ready", func() error {
		_, err := n.call(http.MethodGet, plugin.StatusPath, "")
		return err
	})
}

func (n *node) write(name, text string) {
	n.t.Helper()
	temporary := filepath.Join(n.dir, "."+name)
	if err := os.WriteFile(temporary, []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Rename(temporary, filepath.Join(n.dir, name+".yaml")); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) namespace(name, mode string) {
	n.t.Helper()
	n.write("ns-"+name, fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata:\n  name: %s\n  labels: {other: label, %s: %q}\n", name, modeLabel, mode))
}

// pod is a pod with a network namespace, whose only interface leads nowhere.
type pod struct {
	name, uid string
	ip        netip.Addr
	ns        *os.File
}

func (n *node) pod(name string, last byte, labels string) *pod {
	n.t.Helper()
	p := n.sandbox(name, last)
	n.object(p, labels, true)
	return p
}

// sandbox is a pod that Kubernetes is still to tell of.
func (n *node) sandbox(name string, last byte) *pod {
	n.t.Helper()
	p := &pod{name: name, uid: "uid-of-" + name, ip: netip.AddrFrom4([4]byte{10, 79, 0, last}), ns: testenv.Netns(n.t)}
	err := netns.Do(p.ns, func() error {
		link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "end"}
		if err := netlink.LinkAdd(link); err != nil {
			return err
		}
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: p.ip.AsSlice(), Mask: net.CIDRMask(32, 32)}}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return err
		}
		return netlink.LinkSetUp(link)
	})
	if err != nil {
		n.t.Fatal(err)
	}
	return p
}

// object writes the pod's object, with or without its address.
func (n *node) object(p *pod, labels string, addressed bool) {
	n.t.Helper()
	status := ""
	if addressed {
		status = fmt.Sprintf("status: {phase: Running, podIP: %s, podIPs: [{ip: %s}]}\n", p.ip, p.ip)
	}
	n.write("pod-"+p.name, fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata:\n  name: %s\n  namespace: app\n  uid: %s\n  labels: {%s}\n"+
		"spec: {nodeName: node1, serviceAccountName: sa-of-%s, containers: [{name: c, image: i}]}\n%s", p.name, p.uid, labels, p.name, status))
}

func (p *pod) event() string { return p.eventOf("container-" + p.name) }

// eventOf is what the plugin tells of a sandbox of the pod.
func (p *pod) eventOf(container string) string {
	event := plugin.Event{Netns: nsPath(p.ns), PodName: p.name, PodNamespace: "app", PodUID: p.uid, ContainerID: container,
		IPs: []plugin.IPConfig{{Address: p.ip.String() + "/32"}}}
	text, err := json.Marshal(event)
	if err != nil {
		panic(err)
	}
	return string(text)
}

// call is a request to the agent's socket, as the plugin makes it.
func (n *node) call(method, path, body string) (plugin.Answer, error) {
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", n.cfg.EventSocket)
		}}}
	request, err := http.NewRequest(method, "http://agent"+path, bytes.NewBufferString(body))
	if err != nil {
		return plugin.Answer{}, err
	}
	response, err := client.Do(request)
	if err != nil {
		return plugin.Answer{}, err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return plugin.Answer{}, err
	}
	if response.StatusCode != http.StatusOK {
		return plugin.Answer{}, fmt.Errorf("%s: %s", response.Status, text)
	}
	var answer plugin.Answer
	if len(text) > 0 {
		err = json.Unmarshal(text, &answer)
	}
	return answer, err
}

func (n *node) add(p *pod) plugin.Answer {
	n.t.Helper()
	answer, err := n.call(http.MethodPost, plugin.AddPath, p.event())
	if err != nil {
		n.t.Fatalf("add %s: %v", p.name, err)
	}
	return answer
}

// reach tells what becomes of a connection that an application in the pod makes to somewhere far away: "proxy" takes it, it
// is "refused" because no proxy does, or it goes "out" of the pod, where there is no route.
func (p *pod) reach(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	conn, err := netns.Dial(ctx, p.ns, netns.DialOptions{}, far)
	switch {
	case err == nil:
		conn.Close()
		return "proxy"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, syscall.ENETUNREACH):
		return "out"
	}
	t.Fatalf("connect from %s: %v", p.name, err)
	return ""
}

func (n *node) expect(p *pod, want string) {
	n.t.Helper()
	if got := p.reach(n.t); got != want {
		n.t.Errorf("a connection of %s: %s, want %s", p.name, got, want)
	}
}

func (n *node) expectSoon(p *pod, want string) {
	n.t.Helper()
	n.eventually(fmt.Sprintf("connections of %s: %s", p.name, want), func() error {
		if got := p.reach(n.t); got != want {
			return fmt.Errorf("a connection: %s", got)
		}
		return nil
	})
}

func (n *node) eventually(what string, check func() error) {
	n.t.Helper()
	var err error
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	n.t.Fatalf("not within 30 s: %s: %v", what, err)
}

// proxy is the node proxy, as far as the agent sees it.
type proxy struct {
	bpffs string

	mu        sync.Mutex
	pods      map[string]zds.Workload
	listeners map[string]*net.TCPListener
	held      []*net.TCPConn
	refuse    bool
}

// proxy connects a proxy to the agent until the returned function is called.
func (n *node) proxy() (*proxy, func()) {
	p := &proxy{bpffs: n.cfg.BPFFS, pods: map[string]zds.Workload{}, listeners: map[string]*net.TCPListener{}}
	client := &zds.Client{Socket: n.cfg.ZDSSocket, Handler: p, Log: zap.NewNop()}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- client.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		<-done
		for uid := range p.pods {
			p.Delete(uid)
		}
		for _, conn := range p.held {
			conn.Close()
		}
	})
	n.t.Cleanup(stop)
	return p, stop
}

func (p *proxy) Add(_ context.Context, w zds.Workload) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refuse {
		w.Netns.Close()
		return errors.New("it says no")
	}
	if old, ok := p.pods[w.UID]; ok {
		old.Netns.Close()
		p.listeners[w.UID].Close()
	}
	cookie, err := netns.Cookie(w.Netns)
	if err != nil {
		return err
	}
	slots, err := bpf.OpenListeners(p.bpffs, cookie)
	if err != nil {
		return err
	}
	defer slots.Close()
	l, err := netns.Listen(w.Netns, "tcp4", netip.MustParseAddrPort("127.0.0.1:0"), netns.RedirectMark, true)
	if err != nil {
		return err
	}
	p.pods[w.UID], p.listeners[w.UID] = w, l
	go p.hold(l)
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	raw.Control(func(fd uintptr) { err = slots.Set(bpf.OutboundIPv4, int(fd)) })
	return err
}

// hold accepts connections and keeps them open.
func (p *proxy) hold(l *net.TCPListener) {
	for {
		conn, err := l.AcceptTCP()
		if err != nil {
			return
		}
		p.mu.Lock()
		p.held = append(p.held, conn)
		p.mu.Unlock()
	}
}

func (p *proxy) Delete(uid string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if w, ok := p.pods[uid]; ok {
		delete(p.pods, uid)
		return errors.Join(w.Netns.Close(), p.listeners[uid].Close())
	}
	return nil
}

func (p *proxy) Snapshot(named map[string]struct{}) {
	p.mu.Lock()
	var gone []string
	for uid := range p.pods {
		if _, ok := named[uid]; !ok {
			gone = append(gone, uid)
		}
	}
	p.mu.Unlock()
	for _, uid := range gone {
		p.Delete(uid)
	}
}

// last finds the proxy's end of a connection.
func (p *proxy) last(n *node, client netip.AddrPort) (found *net.TCPConn) {
	n.t.Helper()
	n.eventually("the proxy has the connection", func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, conn := range p.held {
			if addrPort(conn.RemoteAddr()) == client {
				found = conn
				return nil
			}
		}
		return fmt.Errorf("none from %v", client)
	})
	return found
}

func addrPort(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }

func (p *proxy) workload(uid string) (zds.Workload, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	w, ok := p.pods[uid]
	return w, ok
}

func nsPath(ns *os.File) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd()) }
