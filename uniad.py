class Backbone:
    NAMES=("efficientnet_b4","resnet18")
class FeatureCNN: pass
class FeatureMLP: pass
class UniAD: pass
def cached_features(): pass
