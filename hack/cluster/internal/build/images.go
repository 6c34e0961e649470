package build

import (
	"os"
	"path/filepath"
	"runtime"

	"github.com/fairlead-mesh/fairlead/hack/cluster/internal/image"
)

// Names of the images every node has from the start.
const (
	PauseImage   = "docker.io/fairlead/pause:dev"
	CoreDNSImage = "docker.io/fairlead/coredns:dev"
	TestboxImage = "docker.io/fairlead/testbox:dev"
)

// imagesRecipe changes whenever writeImages does, so that cached images are remade.
const imagesRecipe = "images 1"

// busybox is the machine's static busybox, or "": its shell and tools are a
// convenience in the test image, nothing needs them.
func busybox() string {
	for _, p := range []string{"/usr/bin/busybox", "/bin/busybox"} {
		if exists(p) && exists("/usr/share/doc/busybox-static") {
			return p
		}
	}
	return ""
}

func writeImages(t Tools) error {
	box := filepath.Join(t.Bin, "box")
	testbox := image.Image{Names: []string{TestboxImage}, Files: map[string]string{"/usr/bin/box": box}, Dirs: []string{"/tmp", "/etc"},
		Links: map[string]string{}, Entrypoint: []string{"/usr/bin/box"}, Arch: runtime.GOARCH}
	if b := busybox(); b != "" {
		testbox.Files["/bin/busybox"] = b
		for _, a := range []string{"sh", "ls", "cat", "ip", "ping", "wget", "nc", "ps", "mount", "env", "grep", "tar", "netstat", "nslookup", "vi"} {
			testbox.Links["/bin/"+a] = "/bin/busybox"
		}
	}
	for file, img := range map[string]image.Image{
		"pause.tar": {Names: []string{PauseImage}, Files: map[string]string{"/pause": box}, Entrypoint: []string{"/pause"},
			User: "65535:65535", Arch: runtime.GOARCH},
		"coredns.tar": {Names: []string{CoreDNSImage}, Files: map[string]string{"/coredns": filepath.Join(t.Bin, "coredns")},
			Entrypoint: []string{"/coredns"}, Arch: runtime.GOARCH},
		"testbox.tar": testbox,
	} {
		if err := writeImage(filepath.Join(t.Images, file), img); err != nil {
			return err
		}
	}
	return nil
}

func writeImage(path string, img image.Image) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := img.Write(f); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}
