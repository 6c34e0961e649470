package machine

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/config"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/network"
	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/plan"
)

// ReadyFile appears in the cluster's directory when kubelets may start.
const ReadyFile = "api-ready"

// Init is a machine's first process; it returns only when it cannot go on. goAhead
// is read once: a byte means that the network is there, an end that the cluster
// command died.
func Init(m Machine, p plan.Plan, paths config.Paths, goAhead io.Reader) error {
	if _, err := io.ReadFull(goAhead, make([]byte, 1)); err != nil {
		return fmt.Errorf("%s: nobody set up the network: %w", m.Name, err)
	}
	if err := isolate(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(m.Name)); err != nil {
		return fmt.Errorf("setting the host name: %w", err)
	}
	for name, value := range network.Sysctls() {
		if err := os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0); err != nil {
			return fmt.Errorf("setting %s: %w", name, err)
		}
	}
	s := &supervisor{machine: m, bin: paths.Bin, log: os.Stderr, waiting: map[int]chan syscall.WaitStatus{}}
	go s.reap()
	var err error
	if n, ok := p.Node(m.Name); ok {
		err = s.node(p, n, paths)
	} else {
		err = s.controlPlane(p, paths)
	}
	if err != nil {
		return err
	}
	s.logf("%s runs", m.Name)
	select {}
}

// controlPlane starts etcd and the API server, and the controllers once it is ready.
func (s *supervisor) controlPlane(p plan.Plan, paths config.Paths) error {
	s.keep(config.Etcd(paths))
	s.keep(config.APIServer(paths, p))
	if err := waitReady(p.ControlPlane[0], filepath.Join(paths.PKI(), "ca.crt")); err != nil {
		return err
	}
	for _, d := range config.Controllers(paths) {
		s.keep(d)
	}
	return nil
}

// node starts the runtime, loads the images every node has, and starts the rest
// when the API server knows the node.
func (s *supervisor) node(p plan.Plan, n plan.Node, paths config.Paths) error {
	if err := nodeRoot(s.machine, p.Spec.Cgroup, paths.Run, filepath.Dir(paths.Bin)); err != nil {
		return err
	}
	files, err := config.NodeFiles(paths, p, n)
	if err != nil {
		return err
	}
	for path, b := range files {
		// A node that was up before keeps its CNI configuration as others have left it.
		if _, err := os.Stat(path); err == nil && filepath.Dir(path) == "/etc/cni/net.d" {
			continue
		}
		if err := place(path, b); err != nil {
			return err
		}
	}
	if err := copyPlugins(filepath.Join(paths.Bin, "cni"), "/opt/cni/bin"); err != nil {
		return err
	}
	s.keep(config.Containerd())
	if err := poll(60*time.Second, "containerd", func() error { return s.run(filepath.Join(s.bin, "ctr"), "version") }); err != nil {
		return err
	}
	if err := s.loadImages(filepath.Join(filepath.Dir(paths.Bin), "images")); err != nil {
		return err
	}
	ready := filepath.Join(s.machine.Run, ReadyFile)
	if err := poll(10*time.Minute, "the API server", func() error { _, err := os.Stat(ready); return err }); err != nil {
		return err
	}
	for _, d := range config.NodeDaemons(paths, n) {
		s.keep(d)
	}
	return nil
}

// loadImages imports once in a node's life: what containerd holds survives a power cut.
func (s *supervisor) loadImages(dir string) error {
	done := filepath.Join(s.machine.Dir(), "images-loaded")
	if _, err := os.Stat(done); err == nil {
		return nil
	}
	tars, err := filepath.Glob(filepath.Join(dir, "*.tar"))
	if err != nil {
		return err
	}
	for _, t := range tars {
		if err := s.run(filepath.Join(s.bin, "ctr"), ImportArgs(t)...); err != nil {
			return fmt.Errorf("loading %s: %w", t, err)
		}
	}
	return os.WriteFile(done, nil, 0o644)
}

// ImportArgs are ctr's arguments for loading an image tar where kubelets find it.
// Pinned, because what is collected no registry could give back.
func ImportArgs(tar string) []string {
	return []string{"-n", "k8s.io", "images", "import", "--label", "io.cri-containerd.pinned=pinned", tar}
}

func place(path string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	// resolv.conf is a link into /run on many machines; the link is replaced, not followed.
	if err := removeFile(path); err != nil {
		return err
	}
	return os.WriteFile(path, b, 0o644)
}

func copyPlugins(from, to string) error {
	plugins, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, p := range plugins {
		b, err := os.ReadFile(filepath.Join(from, p.Name()))
		if err != nil {
			return err
		}
		// Beside and renamed: the runtime may be about to run the old one.
		tmp := filepath.Join(to, "."+p.Name())
		if err := os.WriteFile(tmp, b, 0o755); err != nil {
			return err
		}
		if err := os.Rename(tmp, filepath.Join(to, p.Name())); err != nil {
			return err
		}
	}
	return nil
}

// waitReady asks the API server until it says that it is ready.
func waitReady(addr netip.Addr, caFile string) error {
	ca, err := os.ReadFile(caFile)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableKeepAlives: true}}
	url := "https://" + netip.AddrPortFrom(addr, 6443).String() + "/readyz"
	return poll(5*time.Minute, "the API server", func() error {
		resp, err := client.Get(url)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
}

func poll(limit time.Duration, what string, try func() error) error {
	var err error
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if err = try(); err == nil {
			return nil
		}
	}
	return fmt.Errorf("waiting %v for %s: %w", limit, what, err)
}
