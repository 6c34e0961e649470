package lab

import (
	"context"
	"errors"
	"fmt"
	"github.com/fairlead-mesh/fairlead/cni/plugin"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/nftables"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-mesh/fairlead/internal/netns"
)

// istiodHost is the name under which the mesh's programs know the control plane.
const istiodHost = "istiod.istio-system.svc"

// rootNamespace is where the mesh's own programs live.
const rootNamespace = "istio-system"

const (
	// startPatience is how long a program may take until it is ready.
	startPatience = 20 * time.Second
	// stopPatience is how long a program may take to end when asked to.
	stopPatience = 10 * time.Second
)

// StartMesh starts istiod-lite, and on each node an agent and a ztunnel, and waits until they are ready.
func (w *World) StartMesh(ctx context.Context) error {
	if err := w.Namespace(rootNamespace, nil); err != nil {
		return err
	}
	for _, n := range w.Nodes {
		if err := n.register(); err != nil {
			return err
		}
	}
	if err := w.step("istiod-lite", func() error { return w.StartIstiod(ctx) }); err != nil {
		return err
	}
	for _, n := range w.Nodes {
		if err := w.step("cni-agent on "+n.Name, func() error { return n.StartAgent(ctx) }); err != nil {
			return err
		}
		if err := w.step("ztunnel on "+n.Name, func() error { return n.StartZtunnel(ctx) }); err != nil {
			return err
		}
	}
	return nil
}

// stopMesh ends the mesh's programs in the order in which they would leave a node, and lets each agent undo what it did.
func (w *World) stopMesh() error {
	var errs []error
	for _, n := range w.Nodes {
		errs = append(errs, n.StopZtunnel(), n.agent.stop(stopPatience), n.proxyAgent.stop())
		for _, p := range n.programs {
			p.end()
		}
	}
	return errors.Join(append(errs, w.istiod.stop(stopPatience))...)
}

// grant lets the bearer of a token speak for a pod, and returns the file that holds the token.
func (w *World) grant(namespace, serviceAccount, pod string) (string, error) {
	token := "token-of-" + namespace + "-" + pod
	w.mu.Lock()
	defer w.mu.Unlock()
	f, err := os.OpenFile(w.tokenFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	_, err = fmt.Fprintf(f, "%s,%s/%s,%s\n", token, namespace, serviceAccount, pod)
	if err := errors.Join(err, f.Close()); err != nil {
		return "", err
	}
	file := filepath.Join(w.Dir, "ca", token)
	return file, os.WriteFile(file, []byte(token), 0o600)
}

func (w *World) tokenFile() string { return filepath.Join(w.Dir, "ca", "tokens.csv") }
func (w *World) rootCert() string  { return filepath.Join(w.Dir, "ca", "root-cert.pem") }

// StartIstiod starts the control plane and waits until it is ready.
func (w *World) StartIstiod(ctx context.Context) error {
	var err error
	w.istiod, err = w.control.start(filepath.Join(w.Dir, "log"), command{
		name: "istiod-lite", path: filepath.Join(w.opts.Bin, "istiod-lite"), cgroup: filepath.Join(w.cgroup, "control"),
		args: []string{
			"--config-dir=" + w.objects.dir, "--ca-dir=" + filepath.Join(w.Dir, "ca"),
			"--token-auth-file=" + w.tokenFile(), "--namespace=" + rootNamespace,
		},
	})
	if err != nil {
		return err
	}
	return w.istiod.ready(ctx, w.control, netip.AddrPortFrom(controlAddresses()[0], 15014), "/ready")
}

// StopIstiod ends the control plane; the proxies keep what they know.
func (w *World) StopIstiod() error { return w.istiod.stop(stopPatience) }

// register writes the node and its ztunnel pod, which the control plane looks for when the ztunnel asks for
// certificates of its node's pods.
func (n *Node) register() error {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name}}
	for _, a := range n.Addrs {
		node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	if err := n.world.objects.put("v1", "Node", node); err != nil {
		return err
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: rootNamespace, Name: n.ztunnelPod(), UID: types.UID(n.ztunnelPod()), Labels: map[string]string{"app": "ztunnel"},
		},
		Spec:   corev1.PodSpec{NodeName: n.Name, ServiceAccountName: "ztunnel", HostNetwork: true},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: n.Addrs[0].String(), HostIP: n.Addrs[0].String()},
	}
	if err := n.world.objects.put("v1", "Pod", pod); err != nil {
		return err
	}
	_, err := n.world.grant(rootNamespace, "ztunnel", n.ztunnelPod())
	return err
}

func (n *Node) ztunnelPod() string { return "ztunnel-" + n.Name }

// StartAgent starts the node's cni-agent and waits until it is ready.
func (n *Node) StartAgent(ctx context.Context) error {
	w := n.world
	var err error
	n.agent, err = n.thread.start(filepath.Join(w.Dir, "log"), command{
		name: "cni-agent." + n.Name, path: filepath.Join(w.opts.Bin, "cni-agent"), cgroup: filepath.Join(n.cgroup, "system"),
		args: n.agentFlags(),
	})
	if err != nil {
		return err
	}
	return n.agent.ready(ctx, n.thread, netip.MustParseAddrPort("127.0.0.1:8000"), "/readyz")
}

func (n *Node) agentFlags() []string {
	return []string{
		"--config-dir=" + n.world.objects.dir, "--node-name=" + n.Name, "--cgroup=" + n.cgroup, "--host-netns=/proc/self/ns/net",
		"--record=" + n.record(), "--plugin=" + filepath.Join(n.world.opts.Bin, "cni-plugin"), "--redirection=" + n.world.opts.Redirection, "--cni-bin-dir=" + n.cniBin(), "--cni-conf-dir=" + n.cniConf(),
	}
}

// Uninstall ends the node's ztunnel and agent and makes the node as it was before the agent came.
func (n *Node) Uninstall(ctx context.Context) error {
	if err := errors.Join(n.StopZtunnel(), n.agent.stop(stopPatience)); err != nil {
		return err
	}
	p, err := n.thread.start(filepath.Join(n.world.Dir, "log"), command{
		name: "uninstall." + n.Name, path: filepath.Join(n.world.opts.Bin, "cni-agent"), cgroup: filepath.Join(n.cgroup, "system"),
		args: append([]string{"uninstall"}, n.agentFlags()...),
	})
	if err != nil {
		return err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		p.kill()
	}
	if !p.cmd.ProcessState.Success() {
		return fmt.Errorf("cni-agent uninstall: %v; %s", p.cmd.ProcessState, p.tail())
	}
	return nil
}

func (n *Node) record() string { return filepath.Join(n.dir, "mesh.json") }

// HasRecord tells whether the agent has noted on the node's disk that a namespace is in the mesh.
func (n *Node) HasRecord(namespace string) error {
	r, _, err := plugin.ReadRecord(n.record())
	if err == nil && r.Outside(namespace, "") {
		err = fmt.Errorf("namespace %s is not in it", namespace)
	}
	return err
}

// HasPlugin tells whether the mesh's plugin is in the node's CNI configuration.
func (n *Node) HasPlugin() error {
	files, err := n.CNIFiles()
	if err == nil && !strings.Contains(files, `"type":"`+plugin.Type+`"`) {
		err = fmt.Errorf("no %s in %s", plugin.Type, files)
	}
	return err
}

// CNIFiles are the node's CNI configuration and the names of its plugins.
func (n *Node) CNIFiles() (string, error) {
	var b strings.Builder
	for _, dir := range []string{n.cniConf(), n.cniBin()} {
		files, err := os.ReadDir(dir)
		if err != nil {
			return "", err
		}
		for _, f := range files {
			fmt.Fprintln(&b, f.Name())
			if dir != n.cniConf() {
				continue
			}
			text, err := os.ReadFile(filepath.Join(dir, f.Name()))
			if err != nil {
				return "", err
			}
			b.Write(text)
		}
	}
	return b.String(), nil
}

// StartZtunnel starts the node's ztunnel and waits until it is ready.
func (n *Node) StartZtunnel(ctx context.Context) error {
	w := n.world
	address := "https://" + istiodHost + ":15012"
	var err error
	n.ztunnel, err = n.thread.start(filepath.Join(w.Dir, "log"), command{
		name: "ztunnel." + n.Name, path: filepath.Join(w.opts.Bin, "ztunnel"),
		cgroup: filepath.Join(n.cgroup, "kubepods", "besteffort", "podztunnel", fmt.Sprintf("ztunnel%d", n.ports.stats)),
		env: append([]string{
			"XDS_ADDRESS=" + address, "CA_ADDRESS=" + address, "XDS_ROOT_CA=" + w.rootCert(), "CA_ROOT_CA=" + w.rootCert(),
			"AUTH_TOKEN=" + filepath.Join(w.Dir, "ca", "token-of-"+rootNamespace+"-"+n.ztunnelPod()),
			"NODE_NAME=" + n.Name, "POD_NAME=" + n.ztunnelPod(), "POD_NAMESPACE=" + rootNamespace, "SERVICE_ACCOUNT=ztunnel",
			"INSTANCE_IP=" + n.Addrs[0].String(), "CLUSTER_ID=Kubernetes", "TRUST_DOMAIN=cluster.local",
			"TERMINATION_GRACE_PERIOD=2s",
			fmt.Sprintf("ADMIN_ADDR=localhost:%d", n.ports.admin), fmt.Sprintf("STATS_ADDR=:%d", n.ports.stats),
			fmt.Sprintf("READINESS_ADDR=:%d", n.ports.ready),
		}, n.ZtunnelEnv...),
	})
	if err != nil {
		return err
	}
	return n.ztunnel.ready(ctx, n.thread, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), n.ports.ready), "/healthz/ready")
}

// proxyPorts are where a ztunnel is asked about itself. Two that run side by side share the node's addresses here, which
// pods of a DaemonSet do not.
type proxyPorts struct{ admin, stats, ready uint16 }

var (
	defaultPorts   = proxyPorts{15000, 15020, 15021}
	successorPorts = proxyPorts{16000, 16020, 16021}
)

// ReplaceZtunnel starts a second ztunnel, and asks the first to end when that is ready, as a rolling update does. It
// returns when the first has ended.
func (n *Node) ReplaceZtunnel(ctx context.Context) error {
	former := n.ztunnel
	if n.ports == defaultPorts {
		n.ports = successorPorts
	} else {
		n.ports = defaultPorts
	}
	if err := n.StartZtunnel(ctx); err != nil {
		return err
	}
	return former.stop(stopPatience)
}

// KillZtunnel ends the node's ztunnel as a power cut would: SIGKILL, no word to anybody.
func (n *Node) KillZtunnel() { n.ztunnel.kill() }

// StopZtunnel asks the node's ztunnel to end, and waits for it.
func (n *Node) StopZtunnel() error { return n.ztunnel.stop(stopPatience) }

// KillAgent ends the node's agent as a power cut would.
func (n *Node) KillAgent() { n.agent.kill() }

// ready waits until the program answers 200 to a GET from inside its namespace.
func (p *process) ready(ctx context.Context, t *thread, addr netip.AddrPort, path string) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	return p.waitFor(ctx, func(ctx context.Context) error {
		_, err := t.get(ctx, addr, path)
		return err
	})
}

// get fetches a page from inside the thread's network namespace.
func (t *thread) get(ctx context.Context, addr netip.AddrPort, path string) (string, error) {
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return t.dial(ctx, addr) },
	}}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr.String()+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %s", path, resp.Status, strings.TrimSpace(string(body)))
	}
	return string(body), err
}

// dial connects from inside the thread's network namespace.
func (t *thread) dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return netns.Dial(ctx, t.net, netns.DialOptions{}, to)
}

// Get fetches a page of one of the node's programs, as http://127.0.0.1:15020/metrics, by port and path.
func (n *Node) Get(ctx context.Context, port uint16, path string) (string, error) {
	return n.thread.get(ctx, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), path)
}

// Call makes a call from a program in the node's own namespaces: the Kubelet, whose probes the mesh lets pass, or
// HostProcess, any other.
func (n *Node) Call(ctx context.Context, name string, c Call) (Answer, error) {
	p, err := n.program(name)
	if err != nil {
		return Answer{}, err
	}
	return p.call(ctx, c)
}

// program starts a program of the node when it is first needed.
func (n *Node) program(name string) (*program, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p := n.programs[name]; p != nil {
		return p, nil
	}
	p, err := n.thread.startProgram(filepath.Join(n.world.Dir, "log"), command{
		name: name + "." + n.Name, path: filepath.Join(n.cniBin(), name), cgroup: filepath.Join(n.cgroup, "system"),
	})
	if err == nil {
		n.programs[name] = p
	}
	return p, err
}

// Traces lists what redirection keeps on the node: what is pinned on its BPF file system, without the kernel's own files,
// and the tables of nftables and the pods in them.
func (n *Node) Traces() ([]string, error) {
	var traces []string
	err := n.thread.do(func() error {
		err := filepath.WalkDir("/sys/fs/bpf", func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() && filepath.Ext(path) != ".debug" {
				traces = append(traces, path)
			}
			return err
		})
		if err != nil {
			return err
		}
		tables, err := listTables()
		traces = append(traces, tables...)
		return err
	})
	return traces, err
}

// listTables lists the tables of the calling thread's network namespace, as table/NAME, and the elements of their sets,
// as table/NAME/pods/ADDRESS.
func listTables() ([]string, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, err
	}
	tables, err := conn.ListTables()
	if err != nil {
		return nil, err
	}
	var all []string
	for _, t := range tables {
		all = append(all, "table/"+t.Name)
		sets, err := conn.GetSets(t)
		if err != nil {
			return nil, err
		}
		for _, s := range sets {
			elements, err := conn.GetSetElements(s)
			if err != nil {
				return nil, err
			}
			for _, e := range elements {
				all = append(all, fmt.Sprintf("table/%s/pods/%s", t.Name, net.IP(e.Key)))
			}
		}
	}
	return all, nil
}
