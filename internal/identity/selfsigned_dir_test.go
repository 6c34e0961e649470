package identity

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

func TestOpenSelfSignedSharesItsRoot(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	first, err := OpenSelfSigned(dir, "cluster.local", 0)
	if err != nil {
		t.Fatal(err)
	}
	second, err := OpenSelfSigned(dir, "cluster.local", 0)
	if err != nil {
		t.Fatal(err)
	}
	id := mesh.Identity{TrustDomain: "cluster.local", Namespace: "default", ServiceAccount: "a"}
	bundle, err := second.Fetch(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	other, err := first.Fetch(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if !bundle.Roots.Equal(other.Roots) {
		t.Error("two that opened the same directory do not trust each other")
	}
	if alone, err := NewSelfSigned("cluster.local", 0); err != nil || alone.RootPEM() == first.RootPEM() {
		t.Errorf("one without a directory has the same root (error %v)", err)
	}
}

func TestOpenSelfSignedRefusesAnotherKey(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	for _, d := range []string{dir, other} {
		if _, err := OpenSelfSigned(d, "cluster.local", 0); err != nil {
			t.Fatal(err)
		}
	}
	key, err := os.ReadFile(filepath.Join(other, selfSignedKeyFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, selfSignedKeyFile), key, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenSelfSigned(dir, "cluster.local", 0); err == nil {
		t.Error("opened with a key that is not the root's")
	}
}
