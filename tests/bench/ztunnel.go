package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/cni/redirect"
	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/zds"
	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// nodeProxy says how a lane with one proxy a node is set up.
type nodeProxy struct {
	binary string
	env    []string
	// ebpf: pods are redirected by the programs of this project; else by rules as Istio's CNI agent writes them.
	ebpf bool
	// authority signs the proxy's certificates, asked over gRPC; nil: the proxy makes its own (FAKE_CA).
	authority identity.Authority
}

// start starts a proxy on each machine and gives it its pods.
func (n nodeProxy) start(ctx context.Context, l *lane) error {
	file := filepath.Join(l.dir, "workloads.yaml")
	if err := os.WriteFile(file, []byte(l.workloads()), 0o644); err != nil {
		return err
	}
	for _, served := range [][]role{{client, nearby}, {remote}} {
		if err := n.startOne(ctx, l, file, served); err != nil {
			return fmt.Errorf("lane %s: %w", l.name, err)
		}
	}
	return nil
}

func (n nodeProxy) startOne(ctx context.Context, l *lane, file string, served []role) error {
	m := l.pods[served[0]].machine
	ns, err := newNamespace()
	if err != nil {
		return err
	}
	socket, bpffs := filepath.Join(l.dir, m.name+".sock"), filepath.Join(l.dir, m.name+"-bpf")
	agent := zds.NewServer(zap.NewNop())
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- agent.Serve(serving, socket) }()
	l.close = append(l.close, func() error { stopServing(); return <-ended })

	own, err := l.group.child(filepath.Join(m.name, "ztunnel"))
	if err != nil {
		return err
	}
	certificates, err := n.certificates(l, ns, m)
	if err != nil {
		return err
	}
	env := append(certificates, n.env...)
	env = append(env,
		"FAIRLEAD_BPFFS="+bpffs, "XDS_ADDRESS=", "LOCAL_XDS_PATH="+file, "INPOD_UDS="+socket, "NODE_NAME="+m.name, "CLUSTER_ID=cluster1", "RUST_LOG=info")
	for wait := 0; ; wait++ { // Serve makes the socket
		if _, err := os.Stat(socket); err == nil || wait == 100 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	p, err := command{
		name: l.name + " on " + m.name, ns: ns, group: own, argv: []string{n.binary}, env: env,
		log: filepath.Join(l.dir, m.name+".log"), spawn: l.spawn,
	}.start()
	if err != nil {
		return err
	}
	l.close = append(l.close, func() error { p.stop(); return nil })
	l.proxies = append(l.proxies, &proxy{process: p, pods: served})

	redirector, err := n.redirector(l, m, bpffs)
	if err != nil {
		return err
	}
	if redirector != nil {
		if err := redirector.EnsureProxy(p.cmd.Process.Pid); err != nil {
			return err
		}
	}
	for _, r := range served {
		if err := enrol(ctx, l.pods[r], agent, redirector); err != nil {
			return fmt.Errorf("%w; the proxy's last words: %s", err, lastLines(p.log, 5))
		}
	}
	agent.Synced()
	return awaitReady(ctx, p, "http://127.0.0.1:15021/healthz/ready")
}

// certificates says to the proxy where its certificates come from.
func (n nodeProxy) certificates(l *lane, ns *os.File, m *machine) ([]string, error) {
	if n.authority == nil {
		return []string{"FAKE_CA=true", "FAIRLEAD_FAKE_CA_DIR=" + filepath.Join(l.dir, "ca")}, nil
	}
	root := filepath.Join(l.dir, m.name+"-ca.pem")
	stop, err := lab.ServeAuthority(ns, n.authority, root)
	if err != nil {
		return nil, err
	}
	l.close = append(l.close, stop)
	return []string{"CA_ADDRESS=https://" + lab.AuthorityAddress.String(), "CA_ROOT_CA=" + root}, nil
}

// redirector prepares a machine for redirection by eBPF, for this lane alone; nil where rules do it.
func (n nodeProxy) redirector(l *lane, m *machine, bpffs string) (*redirect.Redirector, error) {
	if !n.ebpf {
		return nil, nil
	}
	cfg := redirect.Config{BPFFS: bpffs, Cgroup: filepath.Join(string(l.group), m.name), HostNetns: m.ns}
	r, err := redirect.New(cfg)
	if err != nil {
		return nil, err
	}
	l.close = append(l.close, func() error {
		r.Close()
		return redirect.Uninstall(cfg)
	})
	return r, nil
}

// enrol does what a CNI agent does: prepare the pod, tell the proxy, and redirect when that has answered.
func enrol(ctx context.Context, p *pod, agent *zds.Server, redirector *redirect.Redirector) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	target := redirect.Pod{UID: "uid-" + string(p.role), Netns: p.ns, IPs: []netip.Addr{p.addr}}
	if redirector == nil {
		if err := istioRules(p.ns); err != nil {
			return err
		}
	} else if _, err := redirector.Prepare(ctx, target); err != nil {
		return err
	}
	w := zds.Workload{UID: target.UID, Name: string(p.role), Namespace: "default", ServiceAccount: string(p.role), Netns: p.ns}
	if err := agent.Add(ctx, w); err != nil {
		return err
	}
	if redirector == nil {
		return nil
	}
	_, err := redirector.Ensure(ctx, target)
	return err
}

// istioRules is the redirection inside a pod that Istio's CNI agent makes: TCP to ports 15001 and 15006 of the proxy,
// whose own connections have a mark.
func istioRules(ns *os.File) error {
	const rules = `*mangle
-A PREROUTING -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
-A OUTPUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff
COMMIT
*nat
-A PREROUTING ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006
-A OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
-A OUTPUT ! -d 127.0.0.1/32 -o lo -j ACCEPT
-A OUTPUT ! -d 127.0.0.1/32 -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001
COMMIT
`
	return netns.Do(ns, func() error {
		for _, step := range []struct {
			argv  []string
			stdin string
		}{
			{[]string{"iptables-restore"}, rules},
			{[]string{"ip", "rule", "add", "fwmark", "0x111/0xfff", "pref", "32764", "lookup", "100"}, ""},
			{[]string{"ip", "route", "add", "local", "0.0.0.0/0", "dev", "lo", "table", "100"}, ""},
		} {
			cmd := exec.Command(step.argv[0], step.argv[1:]...)
			cmd.Stdin = strings.NewReader(step.stdin)
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("redirect by rules: %s: %w: %s", step.argv[0], err, strings.TrimSpace(string(out)))
			}
		}
		return nil
	})
}
