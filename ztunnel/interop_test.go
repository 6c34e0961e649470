package ztunnel_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/testenv"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

// peerNode starts a node with Istio's own ztunnel, under this project's control plane and CNI agent protocol.
func (w *world) peerNode(name, binary string) *node {
	w.t.Helper()
	dir := w.t.TempDir()
	token := filepath.Join(dir, "token")
	w.must(os.WriteFile(token, []byte("token"), 0o600))
	n := &node{name: name, agent: zds.NewServer(zap.NewNop())}
	ctx, cancel := context.WithCancel(context.Background())
	var agent sync.WaitGroup
	socket := filepath.Join(dir, "z")
	n.agent.Synced()
	agent.Go(func() {
		if err := n.agent.Serve(ctx, socket); err != nil {
			w.t.Error(err)
		}
	})
	control, root := w.serveTLS(dir)
	var output bytes.Buffer
	cmd := exec.Command(binary)
	cmd.Env = []string{
		"NODE_NAME=" + name, "POD_NAME=ztunnel-peer", "POD_NAMESPACE=istio-system", "SERVICE_ACCOUNT=ztunnel", "INSTANCE_IP=" + fabric4,
		"XDS_ADDRESS=" + control, "CA_ADDRESS=" + control, "XDS_ROOT_CA=" + root, "CA_ROOT_CA=" + root, "AUTH_TOKEN=" + token,
		"INPOD_UDS=" + socket, "CLUSTER_ID=Kubernetes", "RUST_LOG=info",
	}
	cmd.Stdout, cmd.Stderr = &output, &output
	// Its ports are fixed, so it runs where nobody else listens.
	w.must(netns.Do(w.fabric, cmd.Start))
	var once sync.Once
	n.stop = func() {
		once.Do(func() {
			cancel()
			cmd.Process.Kill()
			cmd.Wait()
			agent.Wait()
			if w.t.Failed() {
				w.t.Logf("the peer says\n%s", &output)
			}
		})
	}
	w.t.Cleanup(n.stop)
	return n
}

// serveTLS serves the control plane in the fabric as well, in TLS, and returns its address and the file with its root.
func (w *world) serveTLS(dir string) (address, root string) {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	w.must(err)
	certificate := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.ParseIP(fabric4)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	authority := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "root"}, NotBefore: certificate.NotBefore, NotAfter: certificate.NotAfter,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	rootDER, err := x509.CreateCertificate(rand.Reader, authority, authority, key.Public(), key)
	w.must(err)
	der, err := x509.CreateCertificate(rand.Reader, certificate, authority, key.Public(), key)
	w.must(err)
	root = filepath.Join(dir, "root.pem")
	w.must(os.WriteFile(root, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: rootDER}), 0o600))
	var l net.Listener
	w.must(netns.Do(w.fabric, func() error {
		l, err = net.Listen("tcp", fabric4+":0")
		return err
	}))
	go w.server.Serve(tls.NewListener(l, &tls.Config{
		NextProtos: []string{"h2"}, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
	}))
	return "https://" + l.Addr().String(), root
}

// TestWithIstiosZtunnel: a pod of this proxy and a pod of Istio's call each other, and each side's policy is kept.
func TestWithIstiosZtunnel(t *testing.T) {
	binary := testenv.RequireEnv(t, "PEER_ZTUNNEL", "the binary of Istio's ztunnel")
	w := newWorld(t)
	ours, theirs := w.pod("ours", 2), w.pod("theirs", 3)
	for _, p := range []*pod{ours, theirs} {
		serveEcho(t, p.ns, 8080)
	}
	node1, node2 := w.node("node1", nil), w.peerNode("node2", binary)
	workloads := []*mesh.Workload{ours.workload("node1", nil), theirs.workload("node2", nil)}
	w.push(workloads, nil, nil)
	w.enrol(node1, ours)
	redirectByRules(t, theirs.ns)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	w.must(node2.agent.Add(ctx, zds.Workload{UID: "uid-theirs", Name: "theirs", Namespace: "shop", ServiceAccount: "theirs", Netns: theirs.ns}))
	addr := func(ip netip.Addr) string { return netip.AddrPortFrom(ip, 8080).String() }
	for _, tc := range []struct {
		name     string
		from, to *pod
		six      bool
		line     map[string]any
	}{
		{"to theirs", ours, theirs, false, map[string]any{"direction": "outbound", "path": "hbone", "dst.identity": identityOf("theirs"), "response_flags": "-"}},
		{"to theirs, IPv6", ours, theirs, true, map[string]any{"direction": "outbound", "path": "hbone", "dst.hbone_addr": addr(theirs.ip6)}},
		{"from theirs", theirs, ours, false, map[string]any{"direction": "inbound", "path": "hbone", "src.identity": identityOf("theirs"), "response_flags": "-"}},
		{"from theirs, IPv6", theirs, ours, true, map[string]any{"direction": "inbound", "path": "hbone", "dst.addr": addr(ours.ip6)}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			from, to := tc.from.ip4, tc.to.ip4
			if tc.six {
				from, to = tc.from.ip6, tc.to.ip6
			}
			answer, err := call(t, tc.from.ns, addr(to))
			if want := from.String() + "\nhello"; err != nil || answer != want {
				t.Errorf("answer %q, %v; want %q", answer, err, want)
			}
			node1.line(t, tc.line)
		})
	}
	w.push(workloads, nil, []*mesh.Authorization{deny("ours", "theirs")})
	for _, p := range [][2]*pod{{ours, theirs}, {theirs, ours}} {
		refused := false
		for deadline := time.Now().Add(3 * time.Second); time.Now().Before(deadline) && !refused; time.Sleep(10 * time.Millisecond) {
			_, err := call(t, p[0].ns, addr(p[1].ip4))
			refused = err != nil
		}
		if !refused {
			t.Errorf("%s still reaches %s under a policy that denies", p[0].name, p[1].name)
		}
	}
	node1.line(t, map[string]any{"direction": "outbound", "response_flags": "DENY", "error": contains("401")})
	node1.line(t, map[string]any{"direction": "inbound", "response_flags": "DENY", "policy": "shop/deny"})
}
