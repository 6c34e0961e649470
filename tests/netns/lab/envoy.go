package lab

import (
	"bytes"
	"context"
	"crypto/x509"
	_ "embed"
	"encoding/pem"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"text/template"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

//go:embed envoy.yaml.tmpl
var envoyConfig string

// EnvoyConfig writes what an Envoy needs to be the HBONE client and server of one pod, below dir in files called name
// with various extensions, and returns the configuration's path. Its admin interface is 127.0.0.1:15000.
func EnvoyConfig(ctx context.Context, dir, name string, authority *identity.SelfSigned, id mesh.Identity) (string, error) {
	config, err := template.New("envoy.yaml").Parse(envoyConfig)
	if err != nil {
		return "", err
	}
	bundle, err := authority.Fetch(ctx, id)
	if err != nil {
		return "", err
	}
	key, err := x509.MarshalPKCS8PrivateKey(bundle.Certificate.PrivateKey)
	if err != nil {
		return "", err
	}
	path := func(ext string) string { return filepath.Join(dir, name+ext) }
	var text bytes.Buffer
	err = config.Execute(&text, map[string]string{"Certificate": path(".crt"), "Key": path(".key"), "Root": path(".root")})
	if err != nil {
		return "", err
	}
	for _, f := range []struct {
		ext     string
		content []byte
	}{
		{".crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: bundle.Certificate.Certificate[0]})},
		{".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})},
		{".root", []byte(authority.RootPEM())},
		{".yaml", text.Bytes()},
	} {
		if err := os.WriteFile(path(f.ext), f.content, 0o600); err != nil {
			return "", err
		}
	}
	return path(".yaml"), nil
}

// StartEnvoy starts an Envoy in the pod, as its proxy for both directions, and waits until it is ready.
func (p *Pod) StartEnvoy(ctx context.Context, binary string, authority *identity.SelfSigned) error {
	w := p.node.world
	id := mesh.Identity{TrustDomain: mesh.DefaultTrustDomain, Namespace: p.Namespace, ServiceAccount: p.ServiceAccount}
	name := "envoy." + p.Namespace + "." + p.Name
	config, err := EnvoyConfig(ctx, w.Dir, name, authority, id)
	if err != nil {
		return fmt.Errorf("configure Envoy: %w", err)
	}
	p.proxy, err = p.thread.start(filepath.Join(w.Dir, "log"), command{
		name: name, path: binary, cgroup: p.cgroup,
		args: []string{"-c", config, "--concurrency", "2", "--disable-hot-restart", "--log-level", "warning"},
	})
	if err != nil {
		return err
	}
	return p.proxy.ready(ctx, p.thread, netip.MustParseAddrPort("127.0.0.1:15000"), "/ready")
}
